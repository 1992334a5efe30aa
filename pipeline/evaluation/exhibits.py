"""The figures of the report, each with its caption and the rows it was drawn from.

Shapes: S seeds, C conditions, L layers.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from scipy.stats import spearmanr

from pipeline.evaluation import plots
from pipeline.evaluation.findings import CLAIMED, flops_saving, time_saving
from pipeline.evaluation.grid import LANGUAGE, Grid, Row, Sample, metric
from pipeline.evaluation.plots import Bars, Curve, Panel, Point
from pipeline.evaluation.summary import NAMES

# More classes than these make no legible confusion map.
CLASSES = 100

BAND = "Bands: 95 % bootstrap intervals over seeds and test texts."
SEEDS = "Lines: means over seeds; bands, with several seeds: from the lowest to the highest."


class Exhibit(NamedTuple):
    """A figure, what it shows, and the rows it was drawn from (with `run_id` where they belong to runs)."""

    name: str
    title: str
    caption: str
    figure: Figure
    rows: Sequence[Row]


def exhibits(grid: Grid) -> Iterator[Exhibit]:
    """In the order of the report, one at a time: figures take memory. What a grid does not have is left out."""
    yield _training(grid)
    for model in grid.models:
        if any(grid.conditions(method, model, "noise") for method in grid.methods):
            yield _severity(grid, model)
    yield from _attack(grid)
    yield from _degradation(grid)
    yield from _consistency(grid)
    yield from _routing(grid)
    yield from _layers(grid)
    for model in grid.models:
        yield from _load(grid, model)
    yield _accuracy(grid)
    yield from _saving(grid)
    for task in grid.tasks:
        yield from _confusion(grid, task)


def _training(grid: Grid) -> Exhibit:
    rows, column, name = grid.tables["history"], f"valid/{grid.unit}", NAMES[grid.unit]
    compressors = grid.prepared["references"]["bits_per_character"] if grid.unit == "bpc" else {}
    known = {f"{key} (test)": compressors[key] for key in ("gzip", "bz2", "xz") if key in compressors}
    panel = Panel("", "training step", f"validation {name}", _over(grid, rows, "step", column))
    figure = plots.curves([panel], "Pre-training", known)
    dashed = " Dashed: compressors on the test split." if known else ""
    caption = f"Validation {name} while pre-training, lower is better. {SEEDS}{dashed}"
    return Exhibit("training", "Training curves", caption, figure, rows)


def _severity(grid: Grid, model: str) -> Exhibit:
    kinds = dict.fromkeys(kind for method in grid.methods for kind, _ in grid.conditions(method, model, "noise"))
    rows, panels = [], []
    for kind in kinds:
        lines = {}
        for method in grid.methods:
            rates = [rate for other, rate in grid.conditions(method, model, "noise") if other == kind]
            if rates:
                samples = [grid.sample(method, model, "clean", "score")]
                samples += [grid.sample(method, model, "noise", "score", only=(kind, rate)) for rate in rates]
                lines[method] = _line(grid, [0.0, *rates], samples, model)
                rows += _curve_rows(grid, method, model, kind, [0.0, *rates], samples)
        panels.append(Panel(kind, "changed, %", _unit(model), lines))
    name = _name(model)
    caption = (
        f"{name}, mode of inference, under every kind of noise against its severity, the share of characters (or words) "
        f"touched. {'Lower' if model == LANGUAGE else 'Higher'} is better. {BAND}"
    )
    return Exhibit(f"severity-{model}", f"{name} under noise", caption, plots.curves(panels, f"{name} under noise"), rows)


def _attack(grid: Grid) -> Iterator[Exhibit]:
    rows, panels = [], []
    for model in grid.models:
        lines = {}
        for method in grid.methods:
            conditions = grid.conditions(method, model, "attack")
            for kind in dict.fromkeys(kind for kind, _ in conditions):
                rates = [rate for other, rate in conditions if other == kind]
                samples = [grid.sample(method, model, "attack", "score", only=(kind, rate)) for rate in rates]
                lost = grid.sample(method, model, "attack", "lost", only=(kind, rates[0]))
                # An attack has its own passages; their clean scores follow from what they lost.
                sign = -1 if model == LANGUAGE else 1
                samples = [Sample(samples[0].values_SU + sign * lost.values_SU, lost.units), *samples]
                lines[method] = _line(grid, [0.0, *rates], samples, model)
                rows += _curve_rows(grid, method, model, kind, [0.0, *rates], samples)
        if lines:
            panels.append(Panel(_name(model), "characters changed, %", _unit(model), lines))
    if panels:
        caption = (
            "An attack that knows the model and changes, one after another, the characters that hurt most. Accuracy: higher is "
            f"better. It has fewer passages than noise has. {BAND}"
        )
        yield Exhibit("attack", "Adaptive attack", caption, plots.curves(panels, "Adaptive attack"), rows)


def _degradation(grid: Grid) -> Iterator[Exhibit]:
    rows, maps = [], {}
    for model in grid.models:
        scores = [
            row
            for method in grid.methods
            for family in ("noise", "attack", "shift")
            for row in grid.scores(method, model, family)
        ]
        kinds = list(dict.fromkeys(row["kind"] for row in scores))
        if not kinds:
            continue
        scale, unit = (1, "bits per token lost") if model == LANGUAGE else (100, "accuracy points lost")
        values = np.full((len(grid.methods), len(kinds)), np.nan)
        for i, method in enumerate(grid.methods):
            for j, kind in enumerate(kinds):
                lost = [row["degradation"] for row in scores if (row["method"], row["kind"]) == (method, kind)]
                values[i, j] = scale * np.mean(lost) if lost else np.nan
        maps[_name(model)] = (grid.methods, kinds, values, unit)
        rows += scores
    if maps:
        caption = (
            "What each kind of corruption costs each method in the mode of inference, mean over severities and seeds; darker is "
            "better. A model that is worse on clean text has less to lose: read it beside the clean scores."
        )
        yield Exhibit("degradation", "Loss by corruption", caption, plots.heat_maps(maps, "Lost to each corruption"), rows)


def _consistency(grid: Grid) -> Iterator[Exhibit]:
    rows, panels, said = [], [], []
    for model in grid.models:
        shown = {}
        for method in grid.methods:
            scores = grid.scores(method, model, "noise")
            same, lost = (grid.by_seed(scores, method, name) for name in ("consistency", "degradation"))
            if same is None or lost is None:
                continue
            same, lost = 100 * same, (1 if model == LANGUAGE else 100) * lost
            shown[method] = [Point(x, y) for x, y in zip(same, lost, strict=True)]
            runs = grid.runs["robustness", None][method]
            rows += [
                {"method": method, "seed": seed, "run_id": run, "model": model, "consistency": x, "degradation": y}
                for seed, run, x, y in zip(grid.seeds, runs, same, lost, strict=True)
            ]
        if shown:
            ylabel = "bits per token lost to noise" if model == LANGUAGE else "accuracy points lost to noise"
            panels.append(Panel(_name(model), "experts unchanged by noise, %", ylabel, shown))
            said.append(f"{_name(model)}: {_correlation([point for points in shown.values() for point in points])}")
    if panels:
        caption = (
            "Does steady routing make a model robust? A point per method and seed, means over all noise. "
            f"{' '.join(said)} Seeds of one method are no independent points, and a correlation over methods that differ in "
            "much else would not show that one causes the other."
        )
        figure = plots.points(panels, "Routing consistency beside robustness")
        yield Exhibit("consistency", "Routing consistency beside robustness", caption, figure, rows)


def _correlation(shown: Sequence[Point]) -> str:
    """Spearman's correlation of consistency and loss, and what follows."""
    x, y = ([getattr(point, axis) for point in shown] for axis in "xy")
    if len(shown) < 5 or len(set(x)) == 1 or len(set(y)) == 1:
        return f"too few different points (n = {len(shown)}) for a correlation."
    found = spearmanr(x, y)
    if found.pvalue >= 0.05:
        meaning = "consistency does not explain the loss"
    else:
        meaning = f"the more consistent the routing, the {'less' if found.statistic < 0 else 'more'} is lost"
    return f"Spearman's rank correlation {found.statistic:z.2f} (n = {len(shown)}, p = {found.pvalue:.3f}): {meaning}."


def _routing(grid: Grid) -> Iterator[Exhibit]:
    rows = grid.tables["routing"]
    panels = [
        Panel(title, "training step", ylabel, lines)
        for column, title, ylabel, scale in (
            ("imbalance", "load imbalance", "largest / mean - 1", 1),
            ("unused", "unused experts", "experts without a token", 1),
            ("perplexity", "code perplexity", "codes in use (perplexity)", 1),
            ("fluctuation", "fluctuation", "assignments changed, %", 100),
        )
        if (lines := _over(grid, rows, "step", column, scale))
    ]
    if panels:
        caption = (
            "Routing at each validation of pre-training, mean over layers. Fluctuation: share of assignments that differ from "
            f"the validation before. {SEEDS}"
        )
        yield Exhibit("routing", "Routing while training", caption, plots.curves(panels, "Routing while training"), rows)


def _layers(grid: Grid) -> Iterator[Exhibit]:
    rows = [row for method in grid.methods for row in grid.layers(method, LANGUAGE)]
    panels = [
        Panel(title, "layer", ylabel, lines)
        for column, title, ylabel, scale in (
            ("consistency", "routing consistency", "experts unchanged by noise, %", 100),
            ("output_cosine", "outputs of experts alike", "mean pairwise cosine", 1),
            ("cka", "representations of experts alike", "linear CKA", 1),
            ("effective_rank", "rank of states", "effective rank", 1),
        )
        if (lines := _over(grid, rows, "layer", column, scale))
    ]
    if panels:
        caption = (
            "The language model's layers in the mode of inference: how many assignments survive noise, and how far the experts "
            f"have collapsed (cosine and CKA near 1, low rank). {SEEDS}"
        )
        yield Exhibit("layers", "Layer by layer", caption, plots.curves(panels, "Layer by layer"), rows)


def _load(grid: Grid, model: str) -> Iterator[Exhibit]:
    for what in ("expert", "code"):
        wanted = (grid.seeds[0], model, what)
        rows = [row for row in grid.tables["load"] if (row["seed"], row["model"], row["what"]) == wanted]
        found: dict[str, dict[float, list[float]]] = {}
        for row in rows:
            layers = found.setdefault(f"{row['method']}, mode {row['mode']}", {})
            layers.setdefault(row["layer"], []).append(row["share"])
        shares = {name: np.array([layers[layer] for layer in sorted(layers)]) for name, layers in found.items()}
        shares = {name: share for name, share in shares.items() if share.shape[1] > 1}
        if shares:
            title = f"{_name(model)}: load of {what}s"
            caption = f"Share of clean test text that each {what} of each layer gets, seed {grid.seeds[0]}. Even is better."
            yield Exhibit(f"{what}-load-{model}", title, caption, plots.share_maps(shares, what), rows)


def _accuracy(grid: Grid) -> Exhibit:
    rows, language, panels = [], {}, []

    def mflops(method: str, mode: str) -> float:
        return grid.compute[method]["flops_per_token"][mode] / 1e6

    def add(stage: str, task: str | None, method: str, mode: str, what: str, key: str, scale: float, hollow: bool) -> list[Point]:
        values_S = metric(grid.results[stage, task][method], "test", key)
        if values_S is None:
            return []
        values_S, x = scale * values_S, mflops(method, mode)
        rows.extend(
            {"method": method, "seed": seed, "run_id": run, "measure": what, "mode": mode, "mflops": x, "score": score}
            for seed, run, score in zip(grid.seeds, grid.runs[stage, task][method], values_S, strict=True)
        )
        several = len(values_S) > 1
        ends = (float(values_S.min()), float(values_S.max())) if several else (None, None)
        return [Point(x, float(values_S.mean()), *ends, hollow)]

    unit = grid.unit
    for method in grid.methods:
        train, infer = grid.modes(method)
        language[method] = add("pretrain", None, method, train, f"test {unit}", unit, 1, train != infer)
        if train != infer:
            language[method] += add("pretrain", None, method, infer, f"test {unit}", f"{unit}_{infer}", 1, False)
    panels.append(Panel("Language model", "MFLOPs per token", f"test {NAMES[unit]}", language))
    for task in grid.tasks:
        tuned = {m: add("finetune", task, m, grid.modes(m)[1], f"{task} accuracy", "accuracy", 100, False) for m in grid.methods}
        panels.append(Panel(task, "MFLOPs per token", "test accuracy, %", tuned))
    caption = (
        "Score against the FLOPs of a forward pass. Filled: mode of inference; hollow: mode of pre-training, where it is another "
        f"({NAMES[unit]}: lower is better). Bars, with several seeds: from the lowest to the highest."
    )
    return Exhibit("accuracy-compute", "Score against compute", caption, plots.points(panels, "Score against compute"), rows)


def _saving(grid: Grid) -> Iterator[Exhibit]:
    rows, panels = [], []
    for method in grid.methods:
        train, infer = grid.modes(method)
        if infer != "discrete":
            continue
        against = [(method, train), *((other, grid.modes(other)[1]) for other in grid.methods if other != method)]
        for phase, text in (("finetune", "fine-tuning"), ("infer", "inference")):
            flops = [100 * flops_saving(grid.compute, (method, infer), other, phase) for other in against]
            timed = [time_saving(grid.compute, (method, infer), other, phase) for other in against]
            times = [(100 * t.value, 100 * t.low, 100 * t.high) if t else None for t in timed]
            names = [f"{other}, {mode}" for other, mode in against]
            panels.append(Bars(f"{method}: {text}", flops, times, names))
            rows += [
                {"method": method, "run_id": grid.compute_runs[method], "mode": infer, "phase": phase}
                | {"against": name, "flops_saved": saved}
                | dict(zip(("time_saved", "low", "high"), time or (None,) * 3, strict=True))
                for name, saved, time in zip(names, flops, times, strict=True)
            ]
    if panels:
        title = "Saved by the discrete path alone"
        caption = (
            "FLOPs (counted; of fine-tuning forward and backward) and time per token (measured on one machine, with 95 % "
            "intervals; it differs from run to run) that the discrete path saves against both paths and against the other "
            "methods as they are at inference."
        )
        figure = plots.saving_bars(panels, title, "FLOPs", "time", 100 * CLAIMED)
        yield Exhibit("saving", title, caption, figure, rows)


def _confusion(grid: Grid, task: str) -> Iterator[Exhibit]:
    rows = [row for row in grid.tables["confusion"] if row["task"] == task]
    labels = list(dict.fromkeys(row["true"] for row in rows))
    if not 0 < len(labels) <= CLASSES:
        return
    place = {label: i for i, label in enumerate(labels)}
    matrices = {method: np.zeros((len(labels), len(labels)), dtype=int) for method in grid.methods}
    for row in rows:
        matrices[row["method"]][place[row["true"]], place[row["predicted"]]] = row["passages"]
    title = f"{task}: which label for which"
    figure = plots.confusion_maps(matrices, labels, f"Classifier on test of {task}, seed {grid.seeds[0]}")
    caption = f"Share of the test passages of each true label (rows) that got each label (columns), seed {grid.seeds[0]}."
    yield Exhibit(f"confusion-{task}", title, caption, figure, rows)


def _over(grid: Grid, rows: Sequence[Row], x: str, column: str, scale: float = 1) -> dict[str, Curve]:
    """A curve per method: mean over seeds and layers of a column against another, where it has values."""
    lines = {}
    for method in grid.methods:
        own = [row for row in rows if row["method"] == method]
        by_x = {
            place: values_S
            for place in sorted({row[x] for row in own})
            if (values_S := grid.by_seed([row for row in own if row[x] == place], method, column)) is not None
        }
        if by_x:
            values_XS = scale * np.array(list(by_x.values()))
            several = values_XS.shape[1] > 1
            ends = (values_XS.min(1), values_XS.max(1)) if several else (None, None)
            lines[method] = Curve(list(by_x), values_XS.mean(1), *ends)
    return lines


def _line(grid: Grid, rates: Sequence[float], samples: Sequence[Sample], model: str) -> Curve:
    found = [grid.interval(sample) for sample in samples]
    scale = 1 if model == LANGUAGE else 100
    value, low, high = (scale * np.array([getattr(one, end) for one in found]) for end in ("value", "low", "high"))
    return Curve([100 * rate for rate in rates], value, low, high)


def _curve_rows(
    grid: Grid, method: str, model: str, kind: str, rates: Sequence[float], samples: Sequence[Sample]
) -> list[dict[str, Any]]:
    """Each seed's score at each rate, as shares or bits, with the interval over all seeds."""
    runs = grid.runs["robustness", None][method]
    rows = []
    for rate, sample in zip(rates, samples, strict=True):
        one = grid.interval(sample)
        rows += [
            {"method": method, "seed": seed, "run_id": run, "model": model, "mode": grid.modes(method)[1], "kind": kind}
            | {"rate": rate, "score": float(values_U.mean()), "mean": one.value, "low": one.low, "high": one.high}
            for seed, run, values_U in zip(grid.seeds, runs, sample.values_SU, strict=True)
        ]
    return rows


def _name(model: str) -> str:
    return "Language model" if model == LANGUAGE else model


def _unit(model: str) -> str:
    return "bits per token" if model == LANGUAGE else "accuracy, %"
