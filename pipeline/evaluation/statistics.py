"""How sure a comparison of methods is: paired bootstrap, Holm's correction, calibration error, area under a curve.

Shapes: S training seeds, U test units (segments or passages), R bootstrap replicates, N predictions.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats
from scipy.integrate import trapezoid

from pipeline.errors import Failure

# Fewer seeds than these cannot support a claim about training.
MIN_SEEDS = 3

_SEED = 0


class Estimate(NamedTuple):
    """A value, its 95 % interval, and where it was tested the two-sided p value of its being 0."""

    value: float
    low: float
    high: float
    p: float | None = None


class Draws:
    """Bootstrap draws shared by all methods, hence paired: seeds with replacement, test units with replacement within them.

    Behind every seed stand the same test units, so a replicate draws units once for all its seeds (scipy.stats.bootstrap draws
    on one level only). That is conservative: what is particular to one seed on one unit counts up to three times (Owen 2007).
    """

    def __init__(self, seeds: int, resamples: int, groups: Mapping[str, np.ndarray] | None = None) -> None:
        """Draw seeds once, for all test sets: the same models are behind them.

        `groups` gives by name of a test set the number (U,) of what each unit was taken from: units of one document are alike, so
        it is documents that are drawn, with all their units. Of a single document the units are drawn: the interval is about it.
        """
        if min(seeds, resamples) < 1:
            raise Failure(f"bootstrap of {seeds} seeds, {resamples} resamples: both have to be at least 1")
        self.seeds, self.resamples = seeds, resamples
        # One seed has nothing to draw from: its interval is about test units only.
        self._weight_RS = (1 + _stretch(seeds) * (self._counts("seeds", seeds) - 1)) / seeds
        self._groups = groups or {}
        self._drawn: dict[tuple[str, int], tuple[np.ndarray, float]] = {}

    def means(self, values_SU: np.ndarray, units: str) -> np.ndarray:
        """Replicates (R,) of the mean over seeds and units.

        `units` names the test set: the same name gives the same draws, another one independent draws of units. Raises Failure
        for values that are not finite, for no units, and for another number of seeds than was drawn.
        """
        values_SU = _checked(values_SU, units)
        size = values_SU.shape[1]
        if len(values_SU) != self.seeds:
            raise Failure(
                f"{units}: values of {len(values_SU)} seeds, expected {self.seeds}; compare methods with the same seeds"
            )
        if (units, size) not in self._drawn:
            group_U = self._groups.get(units, np.arange(size))
            if group_U.shape != (size,) or group_U.dtype.kind not in "iu" or group_U.min() < 0:
                raise Failure(f"{units}: {size} units, but not as many numbers of groups; run `dvc repro`")
            names, group_U = np.unique(group_U, return_inverse=True)
            if len(names) == 1:
                names = group_U = np.arange(size)
            count_RU = self._counts(f"units:{units}", len(names))[:, group_U].astype(np.float64)
            self._drawn[units, size] = count_RU, _stretch(len(names))
        count_RU, stretch = self._drawn[units, size]
        # Sums of right and wrong answers are exact, so that a tie stays one.
        mean_S, drawn_RS = values_SU.mean(1), (count_RU @ values_SU.T) / count_RU.sum(1, keepdims=True)
        return (self._weight_RS * (mean_S + stretch * (drawn_RS - mean_S))).sum(1)

    def _counts(self, name: str, size: int) -> np.ndarray:
        """How often (R, size) each of `size` things is drawn."""
        key = hashlib.sha256(f"{_SEED}:{name}".encode()).digest()[:16]
        rng = np.random.Generator(np.random.Philox(int.from_bytes(key, "little")))
        return rng.multinomial(size, np.full(size, 1 / size), self.resamples)


def _stretch(count: int) -> float:
    """By how much what a bootstrap of `count` things draws has to lie farther from their mean; nothing of one thing.

    A plain bootstrap is too narrow by sqrt((n - 1) / n) (rescaled: Rao and Wu 1988), and knows nothing of how badly few things
    tell their own spread, which Student's t does.
    """
    if count == 1:
        return 0.0
    return math.sqrt(count / (count - 1)) * float(stats.t.ppf(0.975, count - 1) / stats.norm.ppf(0.975))


def estimate(value: float, replicates_R: np.ndarray) -> Estimate:
    """The value with the percentile interval of its replicates, 1/40 of R + 1 outside at each end; R from 39."""
    ordered_R = np.sort(replicates_R)
    outside = max((len(ordered_R) + 1) // 40 - 1, 0)
    return Estimate(float(value), float(ordered_R[outside]), float(ordered_R[-1 - outside]))


def p_value(replicates_R: np.ndarray) -> float:
    """Two-sided p value of 0: twice the share of replicates on the rarer side of it."""
    # Not centred, so that p <= 0.05 exactly where the interval of `estimate` leaves out 0. The data count as one replicate more:
    # p is never 0. Replicates of 0 are on both sides.
    rarer = min((replicates_R <= 0).sum(), (replicates_R >= 0).sum())
    return min(2 * (int(rarer) + 1) / (len(replicates_R) + 1), 1.0)


def difference(values_A_SU: np.ndarray, values_B_SU: np.ndarray, draws: Draws, units: str) -> Estimate:
    """Mean of A minus mean of B, seed by seed and unit by unit, with its p value; errors as of `Draws.means`."""
    A_SU, B_SU = _aligned(values_A_SU, values_B_SU, units)
    replicates_R = draws.means(A_SU - B_SU, units)
    return estimate((A_SU - B_SU).mean(), replicates_R)._replace(p=p_value(replicates_R))


def gain(lost_A_SU: np.ndarray, lost_B_SU: np.ndarray, draws: Draws, units: str, null: float = 0.0) -> Estimate | None:
    """Robustness gain of A over B (METHOD section 5) from what each loses on average; see `gain_of_means`."""
    A_SU, B_SU = _aligned(lost_A_SU, lost_B_SU, units)
    return gain_of_means(A_SU.mean(), B_SU.mean(), draws.means(A_SU, units), draws.means(B_SU, units), null)


def gain_of_means(lost_A: float, lost_B: float, lost_A_R: np.ndarray, lost_B_R: np.ndarray, null: float = 0.0) -> Estimate | None:
    """Gain 1 - A / B from mean degradations and their replicates (R,), as a share; None where B's is not clearly positive.

    A ratio of means: a mean of ratios would be decided by those conditions in which B loses next to nothing. The p value is that
    of the gain being `null`.
    """
    if min(lost_B, estimate(lost_B, lost_B_R).low) <= 0:
        return None
    # In the few replicates left in which B loses nothing A gains nothing, whatever sign the ratio has there.
    gain_R = 1 - np.divide(lost_A_R, lost_B_R, out=np.full(len(lost_B_R), np.inf), where=lost_B_R > 0)
    return estimate(1 - lost_A / lost_B, gain_R)._replace(p=p_value(gain_R - null))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjusted p values, in the order given (scipy adjusts for the false discovery rate only)."""
    p = np.asarray(p_values, dtype=np.float64)
    order = p.argsort()
    adjusted = np.empty_like(p)
    adjusted[order] = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)).clip(max=1)
    return adjusted.tolist()


def expected_calibration_error(confidence_N: np.ndarray, correct_N: np.ndarray, bins: int = 10) -> float:
    """Mean distance of confidence and accuracy over bins (a, b] of equal width, by their share of predictions; 0 to 1."""
    confidence_N, correct_N = np.asarray(confidence_N, dtype=np.float64), np.asarray(correct_N, dtype=np.float64)
    if not confidence_N.size or confidence_N.shape != correct_N.shape:
        raise Failure(
            f"calibration of {confidence_N.size} confidences and {correct_N.size} answers: expected one or more of each"
        )
    if not ((confidence_N >= 0) & (confidence_N <= 1)).all():
        raise Failure("calibration: a confidence is not between 0 and 1; train the model again with a lower learning rate")
    bin_N = np.digitize(confidence_N, np.linspace(0, 1, bins + 1)[1:-1], right=True)
    return float(np.abs(np.bincount(bin_N, correct_N - confidence_N)).sum() / len(bin_N))


def area(rates: Sequence[float], values: Sequence[float]) -> float:
    """Mean height of a curve: its integral over the severity by trapezoids, divided by the range of severities."""
    order = np.argsort(rates)
    x, y = np.asarray(rates, dtype=np.float64)[order], np.asarray(values, dtype=np.float64)[order]
    if len(x) < 2 or x[0] == x[-1] or not np.isfinite([x, y]).all():
        raise Failure(f"area under {list(values)} at rates {list(rates)}: expected finite values at two rates or more")
    return float(trapezoid(y, x) / (x[-1] - x[0]))


def _aligned(values_A_SU: np.ndarray, values_B_SU: np.ndarray, units: str) -> tuple[np.ndarray, np.ndarray]:
    A_SU, B_SU = _checked(values_A_SU, units), _checked(values_B_SU, units)
    if A_SU.shape != B_SU.shape:
        raise Failure(f"{units}: values of shapes {A_SU.shape} and {B_SU.shape}; compare the same seeds and test units")
    return A_SU, B_SU


def _checked(values_SU: np.ndarray, units: str) -> np.ndarray:
    """The values as float64; Failure where there are none or some are not finite."""
    values_SU = np.asarray(values_SU, dtype=np.float64)
    if values_SU.ndim != 2 or not values_SU.size:
        raise Failure(f"{units}: values of shape {values_SU.shape}, expected one or more seeds and test units")
    if bad := int((~np.isfinite(values_SU)).sum()):
        raise Failure(
            f"{units}: {bad} of {values_SU.size} values are not finite; train the model again with a lower learning rate"
        )
    return values_SU
