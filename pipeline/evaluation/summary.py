"""The measures of a grid, a value per method: with a 95 % interval where every text was scored, else the spread over seeds."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from pipeline.evaluation.grid import LANGUAGE, Grid, Sample, metric
from pipeline.evaluation.statistics import Estimate, area

NAMES = {"bpc": "bits per character", "perplexity": "perplexity", "accuracy": "accuracy %"}


class Spread(NamedTuple):
    """Mean over seeds and their standard deviation, None for a single one."""

    value: float
    deviation: float | None


class Measure(NamedTuple):
    """A row of the main table: a value per method, None where it is not defined; `labels` say more about a value."""

    name: str
    values: Mapping[str, Estimate | Spread | None]
    digits: int
    scale: float = 1
    note: str = ""
    labels: Mapping[str, str] = {}


def spread(values_S: Sequence[float] | np.ndarray | None) -> Spread | None:
    if values_S is None:
        return None
    return Spread(float(np.mean(values_S)), float(np.std(values_S, ddof=1)) if len(values_S) > 1 else None)


def measures(grid: Grid) -> list[Measure]:
    """All rows of the main table that have a value; of timings, which differ from run to run, none."""
    found = [*_pretrained(grid), *_codebook(grid), *(row for task in grid.tasks for row in _task(grid, task))]
    for model in grid.models:
        found += _robustness(grid, model)
    found += [*_routing(grid), *_cost(grid)]
    return [row for row in found if any(value is not None for value in row.values.values())]


def timings(grid: Grid) -> list[Measure]:
    """Speed and memory, as measured once per method: medians with their 95 % intervals over repeats."""
    found = []
    for phase, name in (("train", "training"), ("finetune", "fine-tuning"), ("infer", "inference")):
        for place, of in enumerate(("pre-training", "inference")):
            # A method of one mode has its numbers where the phase belongs.
            own = place == (0 if phase == "train" else 1)
            modes = {m: grid.modes(m)[place] for m in grid.methods if own or len(set(grid.modes(m))) > 1}
            timed = {m: grid.compute[m][phase][mode] for m, mode in modes.items()}
            speed = {m: Estimate(one["tokens_per_second"], one["low"], one["high"]) for m, one in timed.items()}
            # None where the system told no memory.
            memory = {m: Spread(one["peak_memory_mib"], None) for m, one in timed.items() if one["peak_memory_mib"] is not None}
            text = f"{name} in the mode of {of}"
            found += [
                Measure(f"{text}, thousand tokens per second", speed, 2, 1e-3, "median of repeats"),
                Measure(f"{text}, peak memory MiB", memory, 0),
            ]
    return [row for row in found if row.values]


def _pretrained(grid: Grid) -> list[Measure]:
    unit, name = grid.unit, NAMES[grid.unit]
    digits, scale = {"bpc": (3, 1), "perplexity": (2, 1), "accuracy": (1, 100)}[unit]
    references = grid.prepared["references"]
    if unit == "accuracy":
        compared = _linear(grid, grid.base, "accuracy")
    elif unit == "bpc":
        compared = ", ".join(f"{k} {v:.3f}" for k, v in references["bits_per_character"].items())
    else:
        compared = ", ".join(f"{k} {v:.0f}" for k, v in references["perplexity"].items())
    rows = [
        Measure(f"test {name}", {m: _test(grid, m, grid.modes(m)[0]) for m in grid.methods}, digits, scale, compared),
        *(
            Measure(text, {m: _test(grid, m, mode) for m in grid.methods if grid.modes(m)[0] != mode}, digits, scale)
            for text, mode in (("- discrete path alone", "discrete"), ("- router's top-k experts alone", "router"))
        ),
    ]
    note = "mode of inference"
    for task in grid.tasks:
        rows += [
            _metric(grid, f"{task}: valid {name}, before warm-up", "warmup", task, ("before", unit), digits, scale, note),
            _metric(grid, "- after warm-up", "warmup", task, ("after", unit), digits, scale, note),
        ]
    return rows


def _linear(grid: Grid, task: str, measure: str) -> str:
    """What a linear classifier scores."""
    references = grid.prepared["references"]
    return f"{references['classifier']} {100 * references['tasks'][task][measure]:.1f}"


def _test(grid: Grid, method: str, mode: str) -> Estimate | None:
    """Score of the whole test split in a mode; None in one that the method does not have."""
    if f"{grid.base}/{mode}/test" not in grid.units[method][0]:
        return None
    found = grid.interval(grid.sample(method, grid.base, "test", "score", mode))
    return Estimate(*(2**value for value in found[:3])) if grid.unit == "perplexity" else found


def _codebook(grid: Grid) -> list[Measure]:
    return [
        _layers(grid, "codebook utilisation %", "utilisation", 0, 100, "share of the codes in use"),
        _layers(grid, "codebook perplexity", "perplexity", 2),
        _metric(grid, "quantization error", "pretrain", None, ("routing", "code_error"), 3, note="squared, per element"),
    ]


def _task(grid: Grid, task: str) -> list[Measure]:
    majority = 100 * grid.prepared["references"]["tasks"][task]["majority"]
    given = ("finetune", task)
    return [
        Measure(
            f"{task}: test accuracy %",
            {method: grid.interval(grid.sample(method, task, "test", "score")) for method in grid.methods},
            1,
            100,
            _linear(grid, task, "accuracy"),
        ),
        _metric(grid, "- macro-F1 %", *given, ("test", "macro_f1"), 1, 100, _linear(grid, task, "macro_f1")),
        _metric(
            grid,
            "- accuracy without pre-training %",
            *given,
            ("scratch", "accuracy"),
            1,
            100,
            f"majority {majority:.1f}",
        ),
        _metric(grid, "- macro-F1 without pre-training %", *given, ("scratch", "macro_f1"), 1, 100),
    ]


def _robustness(grid: Grid, model: str) -> list[Measure]:
    language, base = model == LANGUAGE, model == grid.base
    name, digits, scale = ("bits per token", 3, 1) if language else (f"{model}: accuracy points", 1, 100)
    shifts = dict.fromkeys(kind for method in grid.methods for kind, _ in grid.conditions(method, model, "shift"))
    rows = []
    for family, text, condition in [
        ("noise", "noise", None),
        ("attack", "attack", None),
        *(("shift", f"shift to {kind}", (kind, 0.0)) for kind in shifts),
    ]:
        for other in (False, True) if base else (False,):
            modes = {method: grid.modes(method)[0 if other else 1] for method in grid.methods}
            values = {
                method: grid.interval(grid.sample(method, model, family, "lost", mode))
                if condition is None
                else grid.shift(method, model, condition[0], mode)
                for method, mode in modes.items()
                if (condition is None or condition in grid.conditions(method, model, family, mode))
                and not (other and len(set(grid.modes(method))) == 1)
            }
            note = "mode of inference" if base else ""
            row = (
                Measure("- in the mode of pre-training", values, digits, scale)
                if other
                else Measure(f"{name} lost to {text}", values, digits, scale, note)
            )
            rows.append(row)
    areas = {method: grid.interval(severity_area(grid, method, model)) for method in grid.methods}
    of, what = ("", "bits per token") if language else (f"{model}: ", "accuracy %")
    rows.append(Measure(f"{of}mean {what} over severities", areas, digits, scale, "area under curve"))
    if not language and "dense" in grid.methods:
        rows.append(Measure(f"{of}mean corruption error %", _corruption_errors(grid, model), 1, 100, "dense 100"))
    rows.append(_worst(grid, model, f"{of}worst {what} under noise", digits, scale))
    rows.append(_scores(grid, model, f"{of}experts unchanged by noise %", "noise", "consistency"))
    rows.append(_scores(grid, model, "- corrected for chance (kappa) %", "noise", "kappa"))
    for kind in dict.fromkeys(kind for method in grid.methods for kind, _ in grid.conditions(method, model, "outside")):
        known = {method: grid.outside(method, model, kind) for method in grid.methods}
        rows.append(Measure(f"{model}: told from {kind} by confidence %", known, 1, 100, "area under ROC, chance 50"))
    if not language:
        rows += [
            _scores(grid, model, f"{model}: calibration error %, clean", "clean", "ece"),
            _scores(grid, model, "- under noise", "noise", "ece"),
            _scores(grid, model, f"{model}: answers changed by noise %", "noise", "flips"),
        ]
    return rows


def severity_area(grid: Grid, method: str, model: str) -> Sample | None:
    """Area under the score against severity from clean on, per unit, over its width; mean over the kinds of noise."""
    clean = grid.sample(method, model, "clean", "score")
    conditions = grid.conditions(method, model, "noise")
    if not conditions:
        return None
    areas = []
    for kind in dict.fromkeys(kind for kind, _ in conditions):
        rates = [rate for other, rate in conditions if other == kind]
        noisy = [grid.sample(method, model, "noise", "score", only=(kind, rate)).values_SU for rate in rates]
        # The area is linear in the scores: the weight of each is the area under 1 there and 0 elsewhere.
        weights = [area([0.0, *rates], corner) for corner in np.eye(1 + len(rates))]
        areas.append(np.tensordot(weights, np.array([clean.values_SU, *noisy]), 1))
    return Sample(np.mean(areas, axis=0), clean.units)


def _corruption_errors(grid: Grid, model: str) -> dict[str, Spread | None]:
    """Errors under each kind of noise, summed over its severities, relative to those of dense of the same seed; mean over kinds.

    That is ImageNet-C's mCE. None where dense makes no error.
    """
    conditions = grid.conditions("dense", model, "noise")

    def errors(method: str) -> np.ndarray | None:
        """Of each kind and seed (K, S)."""
        if grid.conditions(method, model, "noise") != conditions:
            return None
        wrong: dict[str, list[np.ndarray]] = {}
        for kind, rate in conditions:
            right = grid.sample(method, model, "noise", "score", only=(kind, rate))
            wrong.setdefault(kind, []).append(1 - right.values_SU.mean(1))
        return np.array([np.mean(rates, axis=0) for rates in wrong.values()])

    reference_KS = errors("dense")
    if reference_KS is None or not len(reference_KS) or (reference_KS == 0).any():
        return {}
    found = {method: errors(method) for method in grid.methods}
    return {method: spread((own_KS / reference_KS).mean(0)) for method, own_KS in found.items() if own_KS is not None}


def _worst(grid: Grid, model: str, name: str, digits: int, scale: float) -> Measure:
    values: dict[str, Estimate | None] = {}
    labels = {}
    for method in grid.methods:
        samples = {
            condition: grid.sample(method, model, "noise", "score", only=condition)
            for condition in grid.conditions(method, model, "noise")
        }
        if samples:
            pick = max if model == LANGUAGE else min
            kind, rate = worst = pick(samples, key=lambda condition: samples[condition].values_SU.mean())
            values[method], labels[method] = grid.interval(samples[worst]), f"{kind} {grid.severity(rate)}"
    return Measure(name, values, digits, scale, labels=labels)


def _routing(grid: Grid) -> list[Measure]:
    return [
        Measure(
            "fluctuation of routing while training %",
            {method: spread(_fluctuation(grid, method)) for method in grid.methods},
            2,
            100,
            "last third of validations",
        ),
        _layers(grid, "load imbalance", "imbalance", 2, note="fullest expert over mean, less 1"),
        _layers(grid, "margin of first over second choice", "margin", 3),
        _layers(grid, "collapse: cosine of experts' outputs", "output_cosine", 3),
        _layers(grid, "collapse: CKA of experts", "cka", 3),
        _layers(grid, "collapse: effective rank of states", "effective_rank", 1),
    ]


def _fluctuation(grid: Grid, method: str) -> np.ndarray | None:
    rows = [row for row in grid.tables["routing"] if row["method"] == method]
    steps = sorted({row["step"] for row in rows})
    last = set(steps[-max(1, len(steps) // 3) :])
    return grid.by_seed([row for row in rows if row["step"] in last], method, "fluctuation")


def _cost(grid: Grid) -> list[Measure]:
    def counted(name: str, *keys: str, place: int | None = None, note: str = "") -> Measure:
        values = {}
        for method in grid.methods:
            path = keys if place is None else (*keys, grid.modes(method)[place])
            values[method] = spread(metric([grid.compute[method]], *path))
        return Measure(name, values, 2, 1e-6, note)

    return [
        counted("parameters, million", "parameters", "total"),
        counted("- active per token, pre-training", "parameters", "active", place=0),
        counted("- active per token, inference", "parameters", "active", place=1),
        counted("MFLOPs per token, mode of pre-training", "flops_per_token", place=0, note="forward pass"),
        counted("MFLOPs per token, mode of inference", "flops_per_token", place=1, note="forward pass"),
    ]


def _metric(
    grid: Grid, name: str, stage: str, task: str | None, keys: tuple[str, ...], digits: int, scale: float = 1, note: str = ""
) -> Measure:
    entries: Mapping[str, Any] = grid.results[stage, task]
    return Measure(name, {m: spread(metric(entries[m], *keys)) for m in grid.methods}, digits, scale, note)


def _layers(grid: Grid, name: str, column: str, digits: int, scale: float = 1, note: str = "") -> Measure:
    """A column of layers.csv of the pre-trained model in the mode of inference, mean over layers."""
    values = {m: spread(grid.by_seed(grid.layers(m, grid.base), m, column)) for m in grid.methods}
    return Measure(name, values, digits, scale, note or ("language model" if grid.base == LANGUAGE else "pre-trained model"))


def _scores(grid: Grid, model: str, name: str, family: str, column: str) -> Measure:
    """A column of scores.csv in the mode of inference, mean over the conditions of a family."""
    values = {m: spread(grid.by_seed(grid.scores(m, model, family), m, column)) for m in grid.methods}
    return Measure(name, values, 1, 100)
