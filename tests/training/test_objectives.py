import numpy as np
import pytest
import torch

from pipeline.models.build import build
from pipeline.training.objectives import language_objective
from pipeline.training.optim import adam

TOKENS = np.random.default_rng(0).integers(0, 50, 500).astype(np.uint16)


def objective(model, steps=None):
    return language_objective(model, TOKENS, batch=2, seed=0, mode=model.train_mode, steps=steps)


def test_routers_hear_of_every_step_of_pre_training_and_of_no_other(tiny_spec, seeded, monkeypatch):
    model, heard = build(tiny_spec("smoe")).train(), []
    monkeypatch.setattr(model, "begin_step", heard.append)
    for step in (1, 2, 3, 4):
        objective(model)(step)
    assert heard == []
    for step in (1, 2, 3, 4):
        objective(model, steps=4)(step)
    assert heard == [0.0, 0.25, 0.5, 0.75]


@pytest.mark.parametrize(
    ("method", "parts"),
    [
        ("stablemoe", [{"balance", "bpc", "distil"}, {"bpc"}]),
        ("smoe_dropout", [{"bpc"}, {"bpc"}]),
        ("dense", [{"bpc"}, {"bpc"}]),
    ],
)
def test_parts_of_the_loss_early_and_late(tiny_spec, seeded, method, parts):
    model = build(tiny_spec(method)).train()
    seen = [set(objective(model, steps=10)(step)[1]) for step in (1, 10)]
    assert seen == parts


def test_after_pre_training_nothing_competes(tiny_params, tiny_spec, seeded):
    settings = tiny_params("methods.competesmoe.compete=1.0").method("competesmoe")
    model = build(tiny_spec("competesmoe", settings=settings)).train()
    assert "distil" in objective(model, steps=2)(2)[1]
    for step in (1, 2):
        assert "distil" not in objective(model)(step)[1]


def test_a_frozen_assignment_outlives_all_later_training(tiny_spec, seeded):
    model = build(tiny_spec("stablemoe")).train()
    objective(model, steps=10)(10)
    tokens_BT = torch.randint(50, (2, 20))
    before = [layer.index_NK for layer in model(tokens_BT, "router").layers]
    optimizer = adam(model.parameters(), 0.1, weight_decay=0.1)
    for step in range(1, 4):
        loss, _ = objective(model)(step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    after = [layer.index_NK for layer in model(tokens_BT, "router").layers]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
