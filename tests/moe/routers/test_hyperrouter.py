import pytest
import torch

from pipeline.moe.routers.base import Sizes
from pipeline.moe.routers.hyperrouter import HyperRouter
from pipeline.training.optim import adam
from tests.moe.compare import CASE, SECTIONS, WIDTH


def test_scores_start_as_large_as_those_of_a_default_linear_router(seeded):
    x_ND = torch.randn(200, 64)
    variances = [HyperRouter(SECTIONS["hyperrouter"], Sizes(64, 16, 8, 7, 0.0)).scores(x_ND).var().item() for _ in range(50)]
    expected = torch.stack([torch.nn.Linear(64, 16)(x_ND).var() for _ in range(50)]).mean().item()
    assert sum(variances) / 50 == pytest.approx(expected, rel=0.15)


def test_only_the_embedding_learns():
    made = CASE.layer("hyperrouter").train()
    assert made.assignment_parameters() == [made.router.embedding_D]
    before = {name: tensor.clone() for name, tensor in made.router.state_dict().items()}
    optimizer = adam(made, 0.1)
    made(torch.randn(12, WIDTH), "dense").y_ND.square().sum().backward()
    optimizer.step()
    changed = {name for name, tensor in made.router.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {"embedding_D"}


def test_the_hypernetwork_survives_save_and_load():
    made, loaded = CASE.layer("hyperrouter"), CASE._replace(seed=1).layer("hyperrouter")
    loaded.load_state_dict(made.state_dict())
    x_ND = torch.randn(12, WIDTH)
    assert torch.equal(loaded(x_ND, "router").y_ND, made(x_ND, "router").y_ND)
