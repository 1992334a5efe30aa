import math
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pipeline.data.batches import write_tokens
from pipeline.data.tokenizers import Tokenizer
from pipeline.evaluation.compute import Measured
from pipeline.models.build import build
from pipeline.models.flops import active_parameters, count_flops, flops_per_token
from pipeline.training.problems import Passages
from stages import compute, problems
from stages.paths import Cell, Paths
from stages.problems import language_model

TOKENS = np.frombuffer(b"one two three four five six " * 40, dtype=np.uint8).astype(np.uint16)
GATE = ("methods.vqmoe.combine=gate",)
XL = ("model.positions=relative", "model.memory=32", "model.evaluate_memory=32")


@pytest.fixture
def paths(tmp_path):
    paths = Paths(tmp_path, tmp_path)
    paths.source.mkdir(parents=True)
    Tokenizer.bytes().save(paths.source / "tokenizer.json")
    for split in ("train", "valid", "test"):
        write_tokens(paths.source / f"{split}.npy", [TOKENS])
    np.save(paths.source / "test.documents.npy", np.array([0]))
    return paths


def _params(tiny_params, method, *overrides):
    params = tiny_params("model.context=16", "model.evaluate_context=16", "finetune.crop=8", *overrides)
    chosen = params.select(("data.view", "model", "pretrain", "finetune", "machine"), method)
    chosen.compute = SimpleNamespace(repeats=6)
    return chosen


@pytest.mark.parametrize(
    ("method", "modes", "overrides"),
    [
        ("vqmoe", ["both", "discrete"], ()),
        ("vqmoe", ["both", "discrete"], (*GATE, *XL)),
        ("smoe_dropout", ["dense", "router"], ()),
        ("competesmoe", ["router"], ("methods.competesmoe.compete=0.0",)),
        ("dense", ["dense"], ()),
    ],
)
def test_metrics(tiny_params, paths, monkeypatch, method, modes, overrides):
    params = _params(tiny_params, method, *overrides)
    cell = Cell(method, 0)
    # Of each work k, in round r it takes (k + 1) (r + 1) seconds.
    factor = {}

    def measure(works, repeats):
        for number, (name, work) in enumerate(works.items()):
            work()
            factor[name] = number + 1
        rounds = np.arange(1.0, repeats + 1)
        return {name: Measured(factor[name] * rounds, 7.0) for name in works}

    monkeypatch.setattr(compute, "measure", measure)
    metrics = compute.run(params, paths, cell, None)
    model = build(language_model(params, cell, Tokenizer.bytes()))
    assert metrics["parameters"]["total"] == sum(parameter.numel() for parameter in model.parameters())
    assert metrics["parameters"]["active"] == {mode: active_parameters(model, mode) for mode in modes}
    forward = {mode: flops_per_token(model, mode, 16, params.model.memory, targets=TOKENS) for mode in modes}
    assert metrics["flops_per_token"] == forward
    for what, size in {"train": 4 * 16, "finetune": 4 * 8, "infer": 4 * 16}.items():
        assert list(metrics[what]) == modes
        for mode, found in metrics[what].items():
            per_second = size / factor[f"{what}/{mode}"]
            assert found.pop("flops_per_token") > 0
            expected = {"tokens_per_second": per_second / 3.5, "low": per_second / 6, "high": per_second, "peak_memory_mib": 7.0}
            assert found == pytest.approx(expected)
    assert ("saving" in metrics) is (len(modes) == 2)
    for what, found in metrics.get("saving", {}).items():
        seconds = 1 - factor[f"{what}/{modes[1]}"] / factor[f"{what}/{modes[0]}"]
        assert found.pop("flops") > 0
        assert found == pytest.approx({"seconds": seconds, "low": seconds, "high": seconds})


def test_flops_of_a_step(tiny_params, paths, seeded):
    params = _params(tiny_params, "vqmoe")
    metrics = compute.run(params, paths, Cell("vqmoe", 0), None)
    m = params.model
    forward, attention = metrics["flops_per_token"], m.layers * 2 * 2 * 16 * m.width
    for mode in ("both", "discrete"):
        assert metrics["infer"][mode]["flops_per_token"] == forward[mode]
        assert metrics["train"][mode]["flops_per_token"] == pytest.approx(3 * forward[mode] + attention / 2)
    for what in ("train", "finetune", "infer"):
        costs = {mode: metrics[what][mode]["flops_per_token"] for mode in ("both", "discrete")}
        assert metrics["saving"][what]["flops"] == pytest.approx(1 - costs["discrete"] / costs["both"])
        # One expert less per layer, in every pass.
        passes, expert = 1 if what == "infer" else 3, 2 * 2 * m.width * m.expert_width
        assert costs["both"] - costs["discrete"] == pytest.approx(passes * m.layers * expert)


def _costs(tiny_params, paths, monkeypatch, method, *overrides):
    """FLOPs per token and seconds of each work, where the rest of a work takes a second and each billion FLOPs another."""

    def measure(works, repeats):
        return {name: Measured(np.full(repeats, 1 + 1e-9 * count_flops(work)), 7.0) for name, work in works.items()}

    monkeypatch.setattr(compute, "measure", measure)
    metrics = compute.run(_params(tiny_params, method, "model.layers=5", *overrides), paths, Cell(method, 0), None)
    sizes, modes = {"train": 4 * 16, "finetune": 4 * 8, "infer": 4 * 16}, metrics["flops_per_token"]
    costs = {f"{what}/{mode}": metrics[what][mode]["flops_per_token"] for what in sizes for mode in modes}
    for what, size in sizes.items():
        for mode in modes:
            seconds = 1 + 1e-9 * size * costs[f"{what}/{mode}"]
            assert metrics[what][mode]["tokens_per_second"] == pytest.approx(size / seconds, rel=1e-9)
    return costs


@pytest.mark.parametrize(("compete", "at_once"), [(0.07, 9), (0.5, 2), (0.3, 1), (1.0, 3)])
def test_competitions_count_as_often_as_they_happen_in_pre_training_alone(tiny_params, paths, monkeypatch, compete, at_once):
    def costs(compete, at_once):
        given = (f"methods.competesmoe.compete={compete}", f"methods.competesmoe.at_once={at_once}")
        return _costs(tiny_params, paths, monkeypatch, "competesmoe", *given)

    never, always, found = costs(0.0, 5), costs(1.0, 5), costs(compete, at_once)
    assert always["train/router"] > 1.2 * never["train/router"]
    competing = [min(sum(layers), at_once) / 5 for layers in product((0, 1), repeat=5)]
    odds = [math.prod(compete if one else 1 - compete for one in layers) for layers in product((0, 1), repeat=5)]
    layer = always["train/router"] - never["train/router"]
    expected = never | {"train/router": never["train/router"] + np.dot(odds, competing) * layer}
    assert found == pytest.approx(expected)
    assert all(found[name] == never[name] for name in ("finetune/router", "infer/router"))


def test_a_dropped_path_counts_as_often_as_it_is_dropped(tiny_params, paths, monkeypatch):
    def costs(drop):
        return _costs(tiny_params, paths, monkeypatch, "vqmoe", f"methods.vqmoe.drop_routed={drop}", *GATE)

    never, found = costs(0.0), costs(0.25)
    for name, cost in never.items():
        dropped = never[name.replace("both", "discrete")] if not name.startswith("infer") else cost
        # The gate, whose weights need the routed path, goes with it.
        assert found[name] == pytest.approx(0.75 * cost + 0.25 * dropped), name


def _moved(work, *models):
    before = [{name: tensor.clone() for name, tensor in model.state_dict().items()} for model in models]
    work()
    return [
        {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, old[name])}
        for model, old in zip(models, before, strict=True)
    ]


def test_works_do_what_their_stages_do(tiny_params, paths, seeded, monkeypatch):
    params, cell = _params(tiny_params, "vqmoe", *GATE), Cell("vqmoe", 0)
    source = problems.source(params, paths, cell)
    model, task, made = source.fresh(), problems.made_up_task(params, cell, source), []
    monkeypatch.setattr(Passages, "fresh", lambda self: made.append(build(self.spec)) or made[-1])
    works = compute._works(params, source, model, task)
    (classifier,) = made
    assert set(works) == {f"{what}/{mode}" for what in ("train", "finetune", "infer") for mode in ("both", "discrete")}
    for one in (model, classifier.backbone):
        assert all(layer.quantizer.started for layer in one.moe_layers)
    routed = {f"blocks.{block}.moe.{part}.weight" for block in range(2) for part in ("router.scores", "gate")}
    codes = {f"blocks.{block}.moe.quantizer.codebook_CD" for block in range(2)}
    language, other = _moved(works["train/both"], model, classifier)
    assert routed | codes | {"embedding.weight"} <= language and not other
    language, other = _moved(works["train/discrete"], model, classifier)
    assert codes | {"embedding.weight"} <= language and not routed & language and not other
    seen = []
    model.register_forward_hook(lambda *_: seen.append((model.training, torch.is_grad_enabled())))
    for mode in ("both", "discrete"):
        other, tuned = _moved(works[f"finetune/{mode}"], model, classifier)
        assert not other and {"scores.1.weight", "backbone.embedding.weight"} <= tuned
        assert not any("quantizer" in name for name in tuned)
        assert (routed <= {name.removeprefix("backbone.") for name in tuned}) is (mode == "both")
        assert _moved(works[f"infer/{mode}"], model, classifier) == [set(), set()]
    assert seen == [(False, False), (False, False)]


def test_growing_routers_stand_half_way(tiny_params, paths, seeded):
    params, cell = _params(tiny_params, "smoe_dropout"), Cell("smoe_dropout", 0)
    source = problems.source(params, paths, cell)
    model = source.fresh()
    compute._works(params, source, model, problems.made_up_task(params, cell, source))
    assert [layer.router.growing for layer in model.moe_layers] == [3, 3]
