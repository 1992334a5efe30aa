import math

import pytest
import torch
from torch import nn

from pipeline.config import Training
from pipeline.errors import Failure
from pipeline.models.build import build
from pipeline.training.loop import fit
from pipeline.training.optim import adam, learning_rate
from pipeline.training.seeding import seed_everything


def training(**changes):
    values = {
        "steps": 20,
        "batch": 1,
        "learning_rate": 0.1,
        "beta2": 0.98,
        "ramp": 0.1,
        "clip": 1.0,
        "weight_decay": 0.0,
        "validate_every": 5,
    }
    return Training(**(values | changes))


def run(model, objective, validate, settings=None):
    logged = []
    fitted = fit(
        model,
        adam(model, 0.1),
        settings or training(),
        objective=objective,
        validate=validate,
        score="bpc",
        log=lambda values, step: logged.append((step, values)),
        label="test",
    )
    return fitted, logged


def test_the_best_validation_is_kept_not_the_last(seeded):
    model = nn.Linear(1, 1)
    scores, weights = iter([3.0, 1.0, 2.0, 5.0]), []

    def validate():
        weights.append(model.weight.item())
        return {"bpc": next(scores)}

    fitted, logged = run(model, lambda step: ((model(torch.ones(1, 1)) - 9).square().mean(), {}), validate)
    assert fitted.best_step == 10
    assert fitted.best == {"bpc": 1.0}
    assert model.weight.item() == weights[1] != weights[3]
    assert [row["step"] for row in fitted.history] == [5, 10, 15, 20]
    assert {"valid/bpc", "train/loss"} <= {key for _, values in logged for key in values}


def test_a_loss_that_is_not_finite_stops_and_is_named(seeded):
    model = nn.Linear(1, 1)

    def objective(step):
        loss = model(torch.ones(1, 1)).sum()
        return loss, {"balance": loss * (math.nan if step == 7 else 1.0)}

    with pytest.raises(Failure, match=r"balance is nan at step 7"):
        run(model, objective, lambda: {"bpc": 1.0})


def test_a_validation_that_is_not_finite_stops_too(seeded):
    model = nn.Linear(1, 1)
    with pytest.raises(Failure, match=r"validation bpc is nan at step 5"):
        run(model, lambda step: (model(torch.ones(1, 1)).square().mean(), {}), lambda: {"bpc": math.nan})


def test_schedule_rises_then_falls_to_zero():
    settings = training(steps=100)
    rates = [learning_rate(settings, step) for step in range(100)]
    assert rates[0] == pytest.approx(0.01)
    assert rates[9] == pytest.approx(0.1)
    assert rates[:10] == sorted(rates[:10])
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert rates[-1] < 1e-4


@pytest.mark.parametrize("method", ["vqmoe", "dense"])
def test_weight_decay_is_for_weights_and_embeddings_alone(tiny_params, tiny_spec, method):
    params = tiny_params("model.positions=relative", "methods.vqmoe.combine=gate")
    model = build(tiny_spec(method, model=params.model, settings=params.method(method)))
    groups = adam(model, 0.1, beta2=0.7, weight_decay=0.5).param_groups
    names = {parameter: name for name, parameter in model.named_parameters()}
    decays = {group["weight_decay"]: {names[parameter] for parameter in group["params"]} for group in groups}
    layer = {
        "vqmoe": (["experts.w1_EDH"], ["experts.b1_EH", "experts.b2_ED", "quantizer.codebook_CD", "code_embedding_CD"]),
        "dense": (["experts.w1.weight"], ["experts.w1.bias", "experts.w2.bias"]),
    }
    weights, others = ({f"blocks.0.moe.{name}" for name in part} for part in layer[method])
    assert {"embedding.weight", "blocks.0.attention.query.weight"} | weights <= decays[0.5]
    assert {"norm.weight", "relative.content_HF", "relative.position_HF"} | others <= decays[0.0]
    assert {group["betas"] for group in groups} == {(0.9, 0.7)}


def test_seeds_repeat_and_purposes_differ():
    def draw(seed, purpose):
        seed_everything(seed, purpose)
        return torch.rand(3).tolist()

    assert draw(0, "a") == draw(0, "a")
    assert draw(0, "a") != draw(0, "b")
    assert draw(0, "a") != draw(1, "a")
