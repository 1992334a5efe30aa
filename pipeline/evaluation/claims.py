"""What the measurements say about a claim of the kind "at least so much"."""

from typing import Literal, NamedTuple

from pipeline.evaluation.statistics import MIN_SEEDS, Estimate

Verdict = Literal["supported", "not supported", "undecided"]


class Claim(NamedTuple):
    """A claim, what was measured (with its unit), the 95 % interval, and what follows, as ready-made text; then as numbers."""

    claim: str
    measured: str
    interval: str
    verdict: Verdict
    note: str
    value: float | None = None
    low: float | None = None
    high: float | None = None


def verdict(estimate: Estimate | None, threshold: float, seeds: int | None, p_holm: float | None = None) -> tuple[Verdict, str]:
    """Verdict on "at least `threshold`" (a share), and why where it is undecided.

    No estimate: a gain over a method that loses nothing. `seeds` None: a measure that another training run would not change,
    such as FLOPs. A Holm-adjusted p value, of the measure being `threshold`, keeps a claim that was one of many tests from being
    supported by chance.
    """
    if estimate is None:
        return "undecided", "what the other loses cannot be told from zero, so there is no ratio; see the difference under Pairs"
    if seeds is not None and seeds < MIN_SEEDS:
        return "undecided", f"{seeds} seed{'s' if seeds > 1 else ''}: an interval says nothing about another training run"
    if estimate.high < threshold:
        return "not supported", ""
    if estimate.low < threshold:
        return "undecided", f"the interval contains {100 * threshold:g} %"
    if p_holm is not None and p_holm >= 0.05:
        return "undecided", f"p is {p_holm:.2f} after Holm's correction for all that was tested"
    return "supported", ""
