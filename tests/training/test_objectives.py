import numpy as np
import pytest
import torch

from pipeline.models.build import build
from pipeline.training.objectives import LanguageObjective
from pipeline.training.optim import adam
from pipeline.training.seeding import seed_everything

TOKENS = np.random.default_rng(0).integers(0, 50, 161).astype(np.uint16)  # two streams of 80: five segments of 16 each


def made(tiny_spec, tiny_params, *overrides, seed=0, unit="bpc"):
    seed_everything(0, "test")
    model = build(
        tiny_spec(
            "smoe", model=tiny_params("model.context=16", "model.evaluate_context=16", "finetune.crop=16", *overrides).model
        )
    )
    return model, LanguageObjective(model, TOKENS, batch=2, seed=seed, mode="router", unit=unit)


def remembered(model, monkeypatch):
    """The number of tokens in memory at each step, as the model is given them."""
    lengths, forward = [], model.forward

    def watched(tokens_BT, mode, valid_BT, memory):
        lengths.append(0 if memory is None else memory[0].shape[1])
        assert memory is None or not any(state.requires_grad for state in memory)
        return forward(tokens_BT, mode, valid_BT, memory)

    monkeypatch.setattr(model, "forward", watched)
    return lengths


def test_memory_fills_up_and_ends_where_the_streams_begin_anew(tiny_spec, tiny_params, monkeypatch):
    model, step = made(tiny_spec, tiny_params, "model.positions=relative", "model.memory=40")
    lengths = remembered(model, monkeypatch)
    for number in range(1, 16):
        step(number)
    first = lengths.index(0, 1)
    assert first <= 5
    assert lengths[:first] == [0, 16, 32, 40, 40][:first]
    assert lengths[first:] == ([0, 16, 32, 40, 40] * 3)[: 15 - first]


def test_without_memory_segments_are_random_ones(tiny_spec, tiny_params, monkeypatch):
    model, step = made(tiny_spec, tiny_params, "model.positions=relative")
    lengths = remembered(model, monkeypatch)
    for number in range(1, 7):
        step(number)
    assert lengths == [0] * 6


@pytest.mark.parametrize("memory", [0, 24])
def test_the_same_seed_gives_the_same_losses(tiny_spec, tiny_params, memory):
    def losses(seed):
        _, step = made(tiny_spec, tiny_params, "model.positions=relative", f"model.memory={memory}", seed=seed)
        return [step(number)[0].item() for number in range(1, 8)]

    assert losses(0) == losses(0)
    assert losses(0) != losses(1)


def test_parts_are_named_by_the_unit(tiny_spec, tiny_params):
    (_, bits), (_, words) = (made(tiny_spec, tiny_params, unit=unit)[1](1) for unit in ("bpc", "perplexity"))
    assert words["perplexity"].item() == pytest.approx(2 ** bits["bpc"].item())
    assert torch.equal(bits["balance"], words["balance"])


def objective(model, steps=None):
    return LanguageObjective(model, TOKENS, batch=2, seed=0, mode=model.train_mode, unit="bpc", steps=steps)


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
    optimizer = adam(model, 0.1, weight_decay=0.1)
    for step in range(1, 4):
        loss, _ = objective(model)(step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    after = [layer.index_NK for layer in model(tokens_BT, "router").layers]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
