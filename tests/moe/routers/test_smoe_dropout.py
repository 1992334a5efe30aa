import pytest
import torch

from pipeline.training.optim import adam
from tests.moe import reference
from tests.moe.compare import CASE, WIDTH, assert_matches, over_cases

GROWING = {"smoe_dropout": reference.smoe_dropout, "hyperrouter": reference.hyperrouter}


@pytest.mark.parametrize("method", GROWING)
@over_cases
def test_every_mode_matches_the_loops(method, case):
    made, inputs, done = case.layer(method), case.inputs(), case.seed / 999

    def naive(k):
        return lambda layer, x_ND, id_N: GROWING[method](layer, x_ND, k)

    made.router.begin_step([made.router], done)
    assert_matches(made, "router", naive(case.top_k), *inputs)
    assert_matches(made, "dense", naive(case.experts), *inputs)
    half = max(1, case.experts // 2)
    made.train()
    assert_matches(made, "router", naive(case.top_k), *inputs)
    assert_matches(made, "dense", naive(half + round((case.experts - half) * done)), *inputs)


@pytest.mark.parametrize("method", GROWING)
def test_from_half_of_the_experts_to_all(method):
    made = CASE._replace(experts=16).layer(method).train()
    x_ND, seen = torch.randn(3, WIDTH), []
    for step in range(100):
        made.router.begin_step([made.router], step / 100)
        seen.append(made(x_ND, "dense").index_NK.shape[1])
    assert seen == sorted(seen)
    assert (seen[0], seen[50], seen[-1]) == (8, 12, 16)
    assert made.eval()(x_ND, "dense").index_NK.shape[1] == 16
    assert made(x_ND, "router").index_NK.shape[1] == 2


def test_the_router_is_as_drawn_whatever_is_trained():
    made = CASE.layer("smoe_dropout").train()
    assert made.assignment_parameters() == list(made.router.parameters()) == []
    before = {name: tensor.clone() for name, tensor in made.router.state_dict().items()}
    optimizer = adam(made, 0.1, weight_decay=0.1)
    made(torch.randn(12, WIDTH), "dense").y_ND.square().sum().backward()
    optimizer.step()
    assert before.keys() == {"weight_ED", "bias_E"}
    assert all(torch.equal(tensor, before[name]) for name, tensor in made.router.state_dict().items())
    loaded = CASE._replace(seed=1).layer("smoe_dropout")
    loaded.load_state_dict(made.state_dict())
    x_ND = torch.randn(12, WIDTH)
    assert torch.equal(loaded(x_ND, "router").y_ND, made(x_ND, "router").y_ND)
