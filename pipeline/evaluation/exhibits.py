"""The figures of the report, each with its caption and the rows it was drawn from.

Shapes: S seeds, C conditions, L layers.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from scipy.stats import PermutationMethod, pearsonr, rankdata

from pipeline.errors import Failure
from pipeline.evaluation import patches, plots
from pipeline.evaluation.findings import CLAIMED, flops_saving, time_saving
from pipeline.evaluation.grid import IMAGES, LANGUAGE, Grid, Row, Sample
from pipeline.evaluation.plots import Bars, Curve, Map, Panel, Point
from pipeline.evaluation.summary import NAMES

# More classes than these make no legible confusion map, and more codes no legible picture of them.
CLASSES = 100
CODES = 64
# Blocks whose patches are shown.
DEEPEST = 4

# Kinds of corruption whose names do not speak for themselves.
KINDS = {"greedy": "adaptive attack", "raw": "raw text", "fgsm": "FGSM", "pgd": "PGD"}

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
        if grid.conditions(grid.methods[0], model, "noise"):
            yield _severity(grid, model)
            if len(grid.methods) > 1:
                yield _relative(grid, model)
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
    for method in grid.pictures:
        yield from _patches(grid, method)
        yield from _codes(grid, method)


def _training(grid: Grid) -> Exhibit:
    rows, column, name = grid.tables["history"], f"valid/{grid.unit}", NAMES[grid.unit]
    scale, better = (100, "higher") if grid.unit == "accuracy" else (1, "lower")
    compressors = grid.prepared["references"]["bits_per_character"] if grid.unit == "bpc" else {}
    known = {f"{key} (test)": compressors[key] for key in ("gzip", "bz2", "xz") if key in compressors}
    panel = Panel("", "training step", f"validation {name}", _over(grid, rows, "step", column, scale))
    figure = plots.curves([panel], "Pre-training", known)
    dashed = " Dashed: compressors on the test split." if known else ""
    caption = f"Validation {name} while pre-training, {better} is better. {SEEDS}{dashed}"
    return Exhibit("training", "Training curves", caption, figure, rows)


def _severity(grid: Grid, model: str) -> Exhibit:
    name, rows, panels = _name(model), [], []
    for kind, rates in _severities(grid, model).items():
        lines = {}
        for method in grid.methods:
            samples = [grid.sample(method, model, "clean", "score")]
            samples += [grid.sample(method, model, "noise", "score", only=(kind, rate)) for rate in rates]
            lines[method], found = _curve(grid, method, model, kind, [0.0, *rates], samples, "score")
            rows += found
        ylabel = "bits per token" if model == LANGUAGE else "accuracy, %"
        panels.append(Panel(kind, _changed(grid, model, kind), ylabel, lines))
    caption = (
        f"{name}, mode of inference, under every kind of noise against its severity. "
        f"{'Lower' if model == LANGUAGE else 'Higher'} is better. {_band(grid)}"
    )
    return Exhibit(f"severity-{model}", f"{name} under noise", caption, plots.curves(panels, f"{name} under noise"), rows)


def _relative(grid: Grid, model: str) -> Exhibit:
    title, rows, panels = f"{_name(model)}: lost to noise, beside the other methods", [], []
    for kind, rates in _severities(grid, model).items():
        lost = {m: [grid.sample(m, model, "noise", "lost", only=(kind, rate)) for rate in rates] for m in grid.methods}
        means_SU = [np.mean([sample.values_SU for sample in samples], axis=0) for samples in zip(*lost.values(), strict=True)]
        lines = {}
        for method, samples in lost.items():
            less = [Sample(one.values_SU - mean_SU, one.units) for one, mean_SU in zip(samples, means_SU, strict=True)]
            lines[method], found = _curve(grid, method, model, kind, rates, less, "relative")
            rows += found
        panels.append(Panel(kind, _changed(grid, model, kind), f"{_lost(model)}, less mean", lines))
    caption = (
        f"What each method lost to noise less the mean over the methods of the same {_units(grid)}, mode of inference. Below 0: "
        "loses less than the mean of the methods. Bands: 95 % bootstrap intervals of the difference, paired by seed and by "
        f"{_units(grid)}."
    )
    return Exhibit(f"relative-{model}", title, caption, plots.curves(panels, title, {"": 0.0}), rows)


def _attack(grid: Grid) -> Iterator[Exhibit]:
    rows, panels = [], []
    kinds = dict.fromkeys(kind for m in grid.methods for model in grid.models for kind, _ in grid.conditions(m, model, "attack"))
    xlabel = {"bpc": "characters changed, %", "perplexity": "tokens changed, %", "accuracy": "epsilon, 1/255"}[grid.unit]
    for model, attack in itertools.product(grid.models, kinds):
        lines, random = {}, {}
        for method in grid.methods:
            attacks = [one for one in grid.conditions(method, model, "attack") if one[0] == attack]
            noises = [("replace", rate) for _, rate in attacks] if _changed(grid, model, "replace") == xlabel else []
            noises = [noise for noise in noises if noise in grid.conditions(method, model, "noise")]
            for family, conditions, shown in (("attack", attacks, lines), ("noise", noises, random)):
                if conditions:
                    samples = [grid.sample(method, model, family, "lost", only=condition) for condition in conditions]
                    samples = [Sample(np.zeros_like(samples[0].values_SU), samples[0].units), *samples]
                    rates = [0.0, *(rate for _, rate in conditions)]
                    shown[method], found = _curve(grid, method, model, conditions[0][0], rates, samples, "lost")
                    rows += found
        if lines:
            title = _name(model) + (f": {attack.upper()}" if grid.base == IMAGES else "")
            panels.append(Panel(title, xlabel, _lost(model), lines, random))
    if panels:
        how = (
            "What is lost to perturbations of every pixel by at most epsilon that follow the gradient of the loss, once (FGSM) "
            "or step by step from a random start (PGD); lower is better. The attacks have fewer images than noise has."
            if grid.base == IMAGES
            else "What is lost to an attack that knows the model, tries substitutions in random order and keeps those that hurt "
            "most; lower is better. The attack has fewer texts than noise has."
        )
        dashed = " Dashed: lost to as many random replacements." if any(panel.dashed for panel in panels) else ""
        figure = plots.curves(panels, "What attacks cost", dashed="random replacement")
        title = "Attacks" if grid.base == IMAGES else "Adaptive attack"
        yield Exhibit("attack", title, f"{how}{dashed} {_band(grid)}", figure, rows)


def _degradation(grid: Grid) -> Iterator[Exhibit]:
    rows, maps = [], []
    for model in grid.models:
        panels = []
        for families in (("noise",), ("attack", "shift")):
            scores = [row for m in grid.methods for family in families for row in grid.scores(m, model, family)]
            kinds = list(dict.fromkeys(row["kind"] for row in scores))
            values = np.full((len(grid.methods), len(kinds)), np.nan)
            for (i, method), (j, kind) in itertools.product(enumerate(grid.methods), enumerate(kinds)):
                lost = [row["degradation"] for row in scores if (row["method"], row["kind"]) == (method, kind)]
                values[i, j] = _scale(model) * np.mean(lost) if lost else np.nan
            title = f"{_name(model)}: {' and '.join(families)}"
            names = [KINDS.get(kind, kind.replace("_", " ")) for kind in kinds]
            panels.append(Map(title, grid.methods, names, values, _lost(model), 2 if model == LANGUAGE else 1))
            rows += scores
        maps.append(panels)
    if rows:
        caption = (
            "What each corruption costs each method in the mode of inference, mean over severities and seeds; darker is better, "
            f"and every panel has its own scale. {_explained(grid)}A model that is worse on clean {_units(grid)} has less to "
            "lose: read it beside the clean scores."
        )
        yield Exhibit("degradation", "Loss by corruption", caption, plots.heat_maps(maps, "Lost to each corruption"), rows)


def _consistency(grid: Grid) -> Iterator[Exhibit]:
    title, rows, panels, said = "Routing consistency beside robustness", [], [], []
    for model in grid.models:
        shown = {}
        for method in grid.methods:
            same_S = grid.by_seed(grid.scores(method, model, "noise"), method, "kappa")
            if same_S is None:
                continue
            sample = grid.sample(method, model, "noise", "lost")
            lost = [_scale(model) * end for end in grid.interval(sample)[:3]]
            shown[method] = [Point(float(same_S.mean()), *lost)]
            rows += [
                run | {"kappa": same, "degradation": _scale(model) * one_U.mean()}
                for run, same, one_U in zip(_runs(grid, method, model), same_S, sample.values_SU, strict=True)
            ]
        if shown:
            ylabel = f"{_lost(model)} to noise"
            panels.append(Panel(_name(model), "routing consistency (kappa)", ylabel, shown, bottom=0))
            said.append(f"{_name(model)}: {_correlation([point for (point,) in shown.values()])}.")
    if panels:
        caption = (
            "Does steady routing make a model robust? Kappa: experts unchanged by noise, corrected for chance; 1 if all are. A "
            "point per method: means over all noise and seeds, bars: 95 % bootstrap intervals of what is lost. "
            f"{' '.join(said)} A correlation over methods that differ in much else is no cause."
        )
        yield Exhibit("consistency", title, caption, plots.points(panels, title), rows)


def _correlation(shown: Sequence[Point]) -> str:
    """Spearman's correlation of consistency and loss over the methods."""
    ranks = [rankdata([getattr(point, axis) for point in shown]) for axis in "xy"]
    if len(shown) < 5:
        return f"{len(shown)} {'method is' if len(shown) == 1 else 'methods are'} too few for a correlation"
    if any(np.ptp(rank) == 0 for rank in ranks):
        return "all methods are the same, so there is no correlation"
    # By permutation: of few methods the usual p value is far too small.
    found = pearsonr(*ranks, method=PermutationMethod(random_state=0))
    return f"Spearman's rank correlation {found.statistic:z.2f} (n = {len(shown)} methods, p = {found.pvalue:.3f})"


def _routing(grid: Grid) -> Iterator[Exhibit]:
    rows = grid.tables["routing"]
    panels = [
        Panel(title, "training step", ylabel, lines, bottom=bottom)
        for column, title, ylabel, scale, bottom in (
            ("imbalance", "load imbalance", "largest / mean - 1", 1, 0),
            ("unused", "unused experts", "experts without a token", 1, 0),
            ("perplexity", "code perplexity", "codes in use (perplexity)", 1, 1),
            ("fluctuation", "fluctuation", "assignments changed, %", 100, 0),
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
    rows = [row for method in grid.methods for row in grid.layers(method, grid.base)]
    panels = [
        Panel(title, "layer", ylabel, lines)
        for column, title, ylabel, scale in (
            ("kappa", "consistency: steadier is higher", "kappa of experts under noise", 1),
            ("output_cosine", "outputs; 1: all experts answer alike", "mean pairwise cosine", 1),
            ("cka", "representations; 1: all experts alike", "linear CKA", 1),
            ("effective_rank", "rank of states: collapsed is lower", "effective rank", 1),
        )
        if (lines := _over(grid, rows, "layer", column, scale))
    ]
    if panels:
        caption = (
            f"The {_name(grid.base).lower()}'s layers in the mode of inference: how many assignments survive noise, and how far "
            f"the experts have collapsed (cosine and CKA near 1, low rank). {SEEDS}"
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
        for name, layers in found.items():
            if len({len(layer) for layer in layers.values()}) > 1:
                raise Failure(f"load of {name}: {model} has layers with more {what}s than others; run `dvc repro`")
        shares = {name: np.array([layers[layer] for layer in sorted(layers)]) for name, layers in found.items()}
        shares = {name: share for name, share in shares.items() if share.shape[1] > 1}
        if shares:
            title = f"{_name(model)}: load of {what}s"
            even = " or ".join(f"{100 / count:.3g} %" for count in sorted({share.shape[1] for share in shares.values()}))
            caption = (
                f"Share of the assignments on clean test {_units(grid)} that each {what} of each layer gets, seed "
                f"{grid.seeds[0]}; bright is much. An even share would be {even} (white line in the colour bar)."
            )
            yield Exhibit(f"{what}-load-{model}", title, caption, plots.share_maps(shares, what, title), rows)


def _accuracy(grid: Grid) -> Exhibit:
    rows, panels = [], []

    def point(method: str, model: str, mode: str, measure: str, hollow: bool) -> Point:
        sample = grid.sample(method, model, "test", "score", mode)
        estimate, x = grid.interval(sample), grid.compute[method]["flops_per_token"][mode] / 1e6

        def score(value: float) -> float:
            return 2**value if model == LANGUAGE and grid.unit == "perplexity" else _scale(model) * value

        low, high = score(estimate.low), score(estimate.high)
        runs = _runs(grid, method, model, *(("pretrain", None) if model == grid.base else ("finetune", model)))
        rows.extend(
            run | {"mode": mode, "measure": measure, "mflops": x, "score": score(one), "low": low, "high": high}
            for run, one in zip(runs, sample.values_SU.mean(1).tolist(), strict=True)
        )
        return Point(x, score(estimate.value), low, high, hollow)

    for model in grid.models:
        measure = f"test {NAMES[grid.unit]}" if model == LANGUAGE else "test accuracy, %"
        shown = {}
        for method in grid.methods:
            train, infer = grid.modes(method)
            modes = (train, infer) if model == grid.base and train != infer else (infer,)
            shown[method] = [point(method, model, mode, measure, mode != infer) for mode in modes]
        panels.append(Panel(_name(model), "MFLOPs per token", measure, shown))
    caption = (
        f"Score of the whole test split against the FLOPs of a forward pass. {_better(grid)}Accuracy: higher is better. "
        f"Bars: 95 % bootstrap intervals over seeds and test {_units(grid)}; methods are drawn a little apart, so "
        "that those of the same FLOPs do not hide each other."
    )
    figure = plots.points(panels, "Score against compute", apart=3)
    return Exhibit("accuracy-compute", "Score against compute", caption, figure, rows)


def _saving(grid: Grid) -> Iterator[Exhibit]:
    rows, panels = [], []
    for method in grid.methods:
        train, infer = grid.modes(method)
        if infer != "discrete":
            continue
        against = [(method, train), *((other, grid.modes(other)[1]) for other in grid.methods if other != method)]
        names = [f"{other}, {mode}" for other, mode in against]
        for phase, text in (("finetune", "fine-tuning"), ("infer", "inference")):
            flops = [100 * flops_saving(grid.compute, (method, infer), other, phase) for other in against]
            time = time_saving(grid.compute, method, phase)
            ends = (100 * time.value, 100 * time.low, 100 * time.high) if time else None
            panels.append(Bars(f"{method}: {text}", names, flops, ends))
            own = {"method": method, "run_id": grid.compute_runs[method], "mode": infer, "phase": phase}
            rows += [own | {"against": name, "flops_saved": saved} for name, saved in zip(names, flops, strict=True)]
            rows[-len(names)] |= dict(zip(("time_saved", "low", "high"), ends or (), strict=False))
    if panels:
        title = "Saved by the discrete path alone"
        caption = (
            "FLOPs per token (counted; of fine-tuning forward and backward) that the discrete path saves against both paths and "
            "against the other methods as they are at inference; and time per token that it saves against both paths (measured "
            "side by side on one machine, with 95 % intervals; it differs from run to run)."
        )
        yield Exhibit("saving", title, caption, plots.saving_bars(panels, title, 100 * CLAIMED), rows)


def _confusion(grid: Grid, task: str) -> Iterator[Exhibit]:
    rows = [row for row in grid.tables["confusion"] if row["task"] == task]
    labels = list(dict.fromkeys(row["true"] for row in rows))
    if not 0 < len(labels) <= CLASSES:
        return
    place = {label: i for i, label in enumerate(labels)}
    matrices = {method: np.zeros((len(labels), len(labels)), dtype=int) for method in grid.methods}
    for row in rows:
        matrices[row["method"]][place[row["true"]], place[row["predicted"]]] = row["examples"]
    title = f"{task}: which label for which"
    figure = plots.confusion_maps(matrices, labels, f"Classifier on test of {task}, seed {grid.seeds[0]}")
    caption = f"Share of the test examples of each true label (rows) that got each label (columns), seed {grid.seeds[0]}."
    yield Exhibit(f"confusion-{task}", title, caption, figure, rows)


def _patches(grid: Grid, method: str) -> Iterator[Exhibit]:
    """The deepest layers of a method that chooses, on some test images."""
    found, names = grid.pictures[method], grid.prepared["classes"][grid.base]
    (run, *_) = _runs(grid, method, grid.base)
    experts = len({row["index"] for row in grid.tables["load"] if row["method"] == method and row["what"] == "expert"})
    assigned = {"expert": found.expert_LSVRK, "code": found.code_LSVRK}
    for what, index_LSVRK in assigned.items():
        # One expert is no choice, and where codes are as many as experts they say the same.
        if index_LSVRK is None or experts < 2 or (what == "code" and index_LSVRK.max() < experts):
            continue
        shown = [
            patches.Shown(
                found.pixels_SVCHW[image, version],
                condition,
                names[found.label_S[image]],
                names[found.predicted_SV[image, version]],
                dict(list(zip(found.blocks, index_LSVRK[:, image, version], strict=True))[-DEEPEST:]),
            )
            for image in range(len(found.label_S))
            for version, condition in enumerate(found.conditions)
        ]
        title = f"{method}: which {what} gets which patch"
        colours = "" if what == "expert" else " Hue: the code's expert, lightness: the code."
        caption = (
            f"Test images, clean and corrupted, seed {grid.seeds[0]}, mode of inference; each patch in the colour of its first "
            f"{what}, in the deepest blocks with experts. Framed: another {what} than on the clean image.{colours}"
        )
        rows = [run | {"mode": grid.modes(method)[1]} | row for row in patches.patch_rows(shown, what)]
        yield Exhibit(f"patches-{what}-{method}", title, caption, patches.patch_grid(shown, experts, what, title), rows)


def _codes(grid: Grid, method: str) -> Iterator[Exhibit]:
    (run, *_) = _runs(grid, method, grid.base)
    experts = len({row["index"] for row in grid.tables["load"] if row["method"] == method and row["what"] == "expert"})
    for block, codes in grid.pictures[method].nearest.items():
        if len(codes) > CODES:
            continue
        title = f"{method}, block {block}: what each code stands for"
        caption = (
            f"Left: mean of the test patches of each code, seed {grid.seeds[0]}, mode of inference; beside it the patches whose "
            "states are nearest to the code, and above it the share of patches that it has. The state knows the whole image, so "
            "patches of one code need not look alike."
        )
        rows = [run | {"block": block} | row for row in patches.code_rows(codes)]
        yield Exhibit(f"codes-{block}-{method}", title, caption, patches.code_pictures(codes, experts, title), rows)


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


def _severities(grid: Grid, model: str) -> dict[str, list[float]]:
    """The rates of each kind of noise, the same of all methods."""
    conditions = grid.conditions(grid.methods[0], model, "noise")
    return {kind: [rate for other, rate in conditions if other == kind] for kind, _ in conditions}


def _curve(
    grid: Grid, method: str, model: str, kind: str, rates: Sequence[float], samples: Sequence[Sample], what: str
) -> tuple[Curve, list[dict[str, Any]]]:
    """Mean with its interval against severity in percent; and rows: each seed's mean, as shares or bits."""
    found = [grid.interval(sample) for sample in samples]
    value, low, high = (_scale(model) * np.array([getattr(one, end) for one in found]) for end in ("value", "low", "high"))
    rows = [
        run
        | {"mode": grid.modes(method)[1], "kind": kind, "rate": rate, what: float(values_U.mean())}
        | {"mean": one.value, "low": one.low, "high": one.high}
        for rate, sample, one in zip(rates, samples, found, strict=True)
        for run, values_U in zip(_runs(grid, method, model), sample.values_SU, strict=True)
    ]
    percent = 1 if grid.base == IMAGES else 100
    return Curve([percent * rate for rate in rates], value, low, high), rows


def _runs(grid: Grid, method: str, model: str, stage: str = "robustness", task: str | None = None) -> list[dict[str, Any]]:
    """What the row of each seed begins with; the run is that of a stage."""
    runs = zip(grid.seeds, grid.runs[stage, task][method], strict=True)
    return [{"method": method, "seed": seed, "run_id": run, "model": model} for seed, run in runs]


def _changed(grid: Grid, model: str, kind: str) -> str:
    """What a severity is: of text a share, of tokens for a language model whose tokens are no characters."""
    if grid.base == IMAGES:
        return "severity"
    tokens = model == LANGUAGE and grid.unit == "perplexity"
    return f"{'tokens' if tokens else 'words' if kind == 'word' else 'characters'} changed, %"


def _name(model: str) -> str:
    return {LANGUAGE: "Language model", IMAGES: "Pre-trained classifier"}.get(model, model)


def _units(grid: Grid) -> str:
    return "images" if grid.base == IMAGES else "texts"


def _explained(grid: Grid) -> str:
    if grid.base == IMAGES:
        return "FGSM, PGD: adversarial images; shifts: other images, of that name. "
    return (
        "Adaptive attack: the characters that hurt most are changed; raw text: with its punctuation, capitals and digits; other "
        "shifts: another corpus of that name. "
    )


def _band(grid: Grid) -> str:
    return f"Bands: 95 % bootstrap intervals over seeds and test {_units(grid)}."


def _better(grid: Grid) -> str:
    return "" if grid.base == IMAGES else f"{NAMES[grid.unit].capitalize()}: lower is better. "


def _scale(model: str) -> int:
    return 1 if model == LANGUAGE else 100


def _lost(model: str) -> str:
    return "bits per token lost" if model == LANGUAGE else "accuracy points lost"
