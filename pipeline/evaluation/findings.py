"""What the grid says about the paper's claims, and about every pair of methods.

Shapes: S seeds, U units.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from pipeline.evaluation.claims import Claim, verdict
from pipeline.evaluation.grid import IMAGES, LANGUAGE, Grid, Sample
from pipeline.evaluation.statistics import MIN_SEEDS, Estimate, difference, gain, holm
from pipeline.moe.routers import ROUTERS

CLAIMANT = "vqmoe"
CLAIMED = 0.28


def families(grid: Grid) -> dict[str, str]:
    """What claims and pairs are about, by name."""
    return {"noise": "noise", "attack": "FGSM and PGD" if grid.base == IMAGES else "the adaptive attack"}


class Pair(NamedTuple):
    """A measure of one method less that of another, paired by seed and unit; p adjusted over the pairs of the measure.

    Of what is lost also the robustness gain of the first over the second, where the second loses anything.
    """

    measure: str
    first: str
    second: str
    estimate: Estimate
    p_holm: float
    digits: int
    scale: float
    gain: Estimate | None


def claims(grid: Grid) -> list[Claim]:
    """What the paper claims of VQMoE against what the grid measured; none without it. Of timings, none."""
    if CLAIMANT not in grid.methods:
        return []
    others = rivals(grid)
    return [*_robust(grid, others), *_flops(grid), *_accurate(grid, others), *_consistent(grid, others)]


def rivals(grid: Grid) -> list[str]:
    """The other routing methods."""
    return [method for method in grid.methods if method in ROUTERS or method == "softmoe"]


def timed_claims(grid: Grid) -> list[Claim]:
    """The claim about compute in measured time of fine-tuning, which differs from run to run."""
    saved = time_saving(grid.compute, CLAIMANT, "finetune") if CLAIMANT in grid.methods else None
    name = f"{100 * CLAIMED:g} % less time to fine-tune than {_other(CLAIMANT, grid.modes(CLAIMANT)[0])}" if saved else ""
    return [_claim(name, saved, CLAIMED, None, "time, measured")] if saved else []


def time_saving(compute: Mapping[str, Any], method: str, phase: str) -> Estimate | None:
    """Share of a phase's time that a method's mode of inference saves over that of pre-training, which were timed in turns."""
    saved = compute[method].get("saving", {}).get(phase)
    return Estimate(saved["seconds"], saved["low"], saved["high"]) if saved else None


def flops_saving(compute: Mapping[str, Any], one: tuple[str, str], other: tuple[str, str], phase: str) -> float:
    """Share of a phase's FLOPs per token, backward included, that one (method, mode) saves over another."""
    (a, b) = (compute[method][phase][mode]["flops_per_token"] for method, mode in (one, other))
    return 1 - a / b


def pairs(grid: Grid) -> list[Pair]:
    """Every pair of methods, VQMoE's first, in each of the main measures that both have."""
    order = sorted(grid.methods, key=lambda method: method != CLAIMANT)
    found = []
    for model in grid.models:
        unit, digits, scale = ("bits per token", 3, 1) if model == LANGUAGE else ("accuracy points", 1, 100)
        test = "test bits per token" if model == LANGUAGE else "test accuracy points"
        texts = {"test": test} | {family: f"{unit} lost to {text}" for family, text in families(grid).items()}
        for family, text in texts.items():
            name = f"{_model(model)}: {text}"
            samples = {m: grid.sample(m, model, family, "score" if family == "test" else "lost") for m in order}
            both = [(a, b) for a, b in itertools.combinations(order, 2) if samples[a] and samples[b]]
            estimates = [_difference(grid, samples[a], samples[b]) for a, b in both]
            adjusted = holm([one.p for one in estimates])
            for (a, b), one, p in zip(both, estimates, adjusted, strict=True):
                gained = None if family == "test" else _gain(grid, samples[a], samples[b])
                found.append(Pair(name, a, b, one, p, digits, scale, gained))
    return found


def gains(grid: Grid) -> list[dict[str, Any]]:
    """The robustness gain of each method over each other, condition by condition: rows for a file.

    Without a gain where the other loses nothing that the bootstrap can tell from zero.
    """
    rows = []
    for model, family in itertools.product(grid.models, ("noise", "attack")):
        for kind, rate in dict.fromkeys(c for method in grid.methods for c in grid.conditions(method, model, family)):
            samples = {m: grid.sample(m, model, family, "lost", only=(kind, rate)) for m in grid.methods}
            for a, b in itertools.permutations(grid.methods, 2):
                one = _gain(grid, samples[a], samples[b])
                row = {"model": model, "kind": kind, "rate": rate, "method": a, "over": b}
                rows.append(row | {"gain": one and one.value, "low": one and one.low, "high": one and one.high})
    return rows


def too_few(seeds: int) -> str:
    """A note where the seeds are too few to speak of all seeds."""
    return f"{seeds} {'seed' if seeds == 1 else 'seeds'}: fewer than {MIN_SEEDS}" if seeds < MIN_SEEDS else ""


def _robust(grid: Grid, rivals: Sequence[str]) -> list[Claim]:
    gained = {}
    for model, (family, text) in itertools.product(grid.models, families(grid).items()):
        ours = grid.sample(CLAIMANT, model, family, "lost")
        theirs = {rival: sample for rival in rivals if (sample := grid.sample(rival, model, family, "lost"))}
        if ours is None or not theirs:
            continue
        if len(theirs) > 1:
            mean = Sample(np.mean([sample.values_SU for sample in theirs.values()], axis=0), ours.units)
            theirs = {"the mean of the other routing methods": mean} | theirs
        for rival, sample in theirs.items():
            name = f"{100 * CLAIMED:g} % more robust than {rival}: {_model(model)} under {text}"
            gained[name] = _gain(grid, ours, sample, CLAIMED)
    measured = {name: one for name, one in gained.items() if one}
    adjusted = dict(zip(measured, holm([one.p for one in measured.values()]), strict=True))
    coarse = _too_coarse(len(measured), grid.resamples)
    return [_claim(name, one, CLAIMED, len(grid.seeds), coarse, adjusted.get(name)) for name, one in gained.items()]


def _too_coarse(tests: int, resamples: int) -> str:
    """A remark where no p value can be small enough for a claim among so many, whatever the data say."""
    least = 2 / (resamples + 1)
    if tests * least < 0.05:
        return ""
    return f"{resamples} resamples are too few for {tests} tests; report.resamples: {40 * tests} or more"


def _flops(grid: Grid) -> list[Claim]:
    found = []
    for rival, mode in _compared(grid):
        saved = flops_saving(grid.compute, (CLAIMANT, grid.modes(CLAIMANT)[1]), (rival, mode), "finetune")
        name = f"{100 * CLAIMED:g} % less compute to fine-tune than {_other(rival, mode)}"
        found.append(_claim(name, Estimate(saved, saved, saved), CLAIMED, None, "FLOPs of a training step, counted"))
    return found


def _accurate(grid: Grid, rivals: Sequence[str]) -> list[Claim]:
    names, found = [], []
    for task in grid.tasks:
        ours = grid.sample(CLAIMANT, task, "test", "score")
        theirs = {rival: grid.sample(rival, task, "test", "score") for rival in rivals}
        if theirs:
            best = max(theirs, key=lambda rival: theirs[rival].values_SU.mean())
            names.append(f"strong fine-tuning: accuracy on {task} above {best}, the best other routing method")
            found.append(_difference(grid, ours, theirs[best]))
    return _differences(grid, names, found, " points")


def _consistent(grid: Grid, rivals: Sequence[str]) -> list[Claim]:
    names, found = [], []
    for model in grid.models:
        ours, *theirs = (grid.by_seed(grid.scores(m, model, "noise"), m, "kappa") for m in (CLAIMANT, *rivals))
        theirs = [values for values in theirs if values is not None]
        if ours is not None and theirs:
            names.append(f"routing more consistent under noise than the mean of the other routing methods: {_model(model)}")
            # One value per seed: the seeds are all there is to resample.
            found.append(difference(ours[:, None], np.mean(theirs, axis=0)[:, None], grid.draws, f"{model}/seeds"))
    return _differences(grid, names, found, " points")


def _differences(grid: Grid, names: Sequence[str], found: Sequence[Estimate], unit: str) -> list[Claim]:
    adjusted = holm([one.p for one in found])
    return [
        _claim(name, one, 0.0, len(grid.seeds), p_holm=p, unit=unit) for name, one, p in zip(names, found, adjusted, strict=True)
    ]


def _claim(
    name: str,
    measured: Estimate | None,
    threshold: float,
    seeds: int | None,
    remark: str = "",
    p_holm: float | None = None,
    unit: str = " %",
) -> Claim:
    said, note = verdict(measured, threshold, seeds, p_holm)
    note = "; ".join(filter(None, (remark, note)))
    if measured is None:
        return Claim(name, "", "", said, note)
    exact = measured.low == measured.high
    interval = "" if exact else f"[{100 * measured.low:z.1f}, {100 * measured.high:z.1f}]"
    return Claim(name, f"{100 * measured.value:z.1f}{unit}", interval, said, note, *measured[:3])


def _compared(grid: Grid) -> list[tuple[str, str]]:
    """What VQMoE's mode of inference is compared with: its own mode of pre-training, and the other routing methods."""
    train, infer = grid.modes(CLAIMANT)
    own = [(CLAIMANT, train)] if train != infer else []
    return own + [(method, grid.modes(method)[1]) for method in rivals(grid)]


def _other(method: str, mode: str) -> str:
    return f"its own mode {mode}" if method == CLAIMANT else method


def _model(model: str) -> str:
    return {LANGUAGE: "language model", IMAGES: "pre-trained classifier"}.get(model, model)


def _difference(grid: Grid, a: Sample, b: Sample) -> Estimate:
    return difference(a.values_SU, b.values_SU, grid.draws, a.units)


def _gain(grid: Grid, a: Sample, b: Sample, null: float = 0.0) -> Estimate | None:
    return gain(a.values_SU, b.values_SU, grid.draws, a.units, null)
