import os
import subprocess
import sys
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from pipeline.errors import Failure
from pipeline.evaluation.statistics import (
    Draws,
    area,
    difference,
    estimate,
    expected_calibration_error,
    gain,
    gain_of_means,
    holm,
    p_value,
)

# Student's t at 97.5 % for one thing less, as in tables.
T = {2: 12.7062, 3: 4.30265, 4: 3.18245, 5: 2.77645, 6: 2.57058, 20: 2.09302, 40: 2.02269}


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def drawn(draws, size, units):
    """What was drawn, read off the means of values that are 1 at one unit or one seed: counts (R, S), (R, U)."""
    seeds = draws.seeds
    unit_RU = np.stack([draws.means(np.tile(row, (seeds, 1)), units) for row in np.eye(size)], 1) * size
    weight_RS = np.stack([draws.means(np.tile(row, (size, 1)).T, units) for row in np.eye(seeds)], 1)
    return 1 + (weight_RS * seeds - 1) / (stretch(seeds) or 1), 1 + (unit_RU - 1) / stretch(size)


def stretch(count):
    """Of a bootstrap of so many things to the width of Student's t."""
    return (count / (count - 1)) ** 0.5 * T[count] / 1.95996 if count > 1 else 0


@pytest.mark.parametrize("seeds", [1, 2, 4])
def test_replicates_are_means_over_drawn_seeds_and_units(rng, seeds):
    draws, values = Draws(seeds, 50), rng.normal(size=(seeds, 6))
    counts = drawn(draws, 6, "era")
    for count, size in zip(counts, (seeds, 6), strict=True):
        assert np.allclose(count, count.round(), atol=1e-4) and (count > -0.5).all()
        assert np.allclose(count.sum(1), size)
    for replicate, count_S, count_U in zip(draws.means(values, "era"), *counts, strict=True):
        units = [unit for unit in range(6) for _ in range(round(count_U[unit]))]
        chosen = [seed for seed in range(seeds) for _ in range(round(count_S[seed]))]
        # Of each seed the mean over the drawn units, as far from that over all as so few units may be.
        mean_S = [sum(row) / 6 + stretch(6) * (sum(row[unit] for unit in units) / 6 - sum(row) / 6) for row in values]
        of_all, of_chosen = sum(mean_S) / seeds, sum(mean_S[seed] for seed in chosen) / seeds
        assert replicate == pytest.approx(of_all + stretch(seeds) * (of_chosen - of_all), abs=1e-4)


def test_every_seed_and_unit_is_drawn_equally_often():
    for count in drawn(Draws(3, 20_000), 5, "era"):
        assert count.mean(0) == pytest.approx(1, abs=0.03)
        assert count.var(0) == pytest.approx(1 - 1 / count.shape[1], abs=0.05)


def test_few_seeds_spread_as_wide_as_students_t(rng):
    for seeds in (2, 3, 5):
        values = rng.normal(size=(seeds, 1)) + np.zeros((seeds, 4))
        replicates = Draws(seeds, 20_000).means(values, "era")
        half_width = T[seeds] * (values[:, 0].var(ddof=1) / seeds) ** 0.5
        assert 1.95996 * replicates.std() == pytest.approx(half_width, rel=0.03)


def test_few_units_spread_as_wide_as_students_t(rng):
    for units in (2, 3, 5):
        values = rng.normal(size=(1, units))
        replicates = Draws(1, 20_000).means(values, "era")
        half_width = T[units] * (values.var(ddof=1) / units) ** 0.5
        assert 1.95996 * replicates.std() == pytest.approx(half_width, rel=0.03)


@pytest.mark.parametrize("units", [8, 20])
def test_intervals_of_few_units_hold_the_true_mean_as_often_as_is_said(rng, units):
    draws, values = Draws(1, 999), rng.normal(size=(800, units))
    found = [estimate(row.mean(), draws.means(row[None], "era")) for row in values]
    assert 0.93 <= sum(one.low <= 0 <= one.high for one in found) / 800 <= 0.975


def test_a_name_decides_the_units_and_never_the_seeds(rng):
    values = rng.normal(size=(1, 50))
    draws = Draws(1, 2000)
    assert (draws.means(values, "era") == Draws(1, 2000).means(values, "era")).all()
    assert abs(np.corrcoef(draws.means(values, "era"), draws.means(values, "austen"))[0, 1]) < 0.1
    # Neither do seeds follow units of the same number, nor do two sets of one name have to be of one size.
    seed, unit = drawn(Draws(5, 2000), 5, "era")
    assert abs(np.corrcoef(seed[:, 0], unit[:, 0])[0, 1]) < 0.1
    assert draws.means(values[:, :20], "era").shape == (2000,)
    # Test sets of other units and another size, the same seeds: what seeds do cancels.
    by_seed, draws = rng.normal(size=(3, 1)), Draws(3, 50)
    shifted, clean = by_seed + np.ones((3, 7)), by_seed + np.zeros((3, 9))
    assert draws.means(shifted, "austen") - draws.means(clean, "language") == pytest.approx(1)


def test_draws_are_the_same_in_every_process():
    code = "from pipeline.evaluation.statistics import Draws; print(Draws(2, 3).means([[1, 0, 0], [0, 2, 0]], 'era').tolist())"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "PYTHONHASHSEED": "7"}
    made = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=True, text=True)
    assert made.stdout.strip() == str(Draws(2, 3).means([[1, 0, 0], [0, 2, 0]], "era").tolist())


def test_nothing_differs_from_itself(rng):
    values = rng.normal(size=(3, 20))
    assert difference(values, values, Draws(3, 200), "era") == (0, 0, 0, 1)


def test_pairing_cancels_what_methods_share(rng):
    shared = rng.normal(size=(3, 1)) + rng.normal(size=(1, 100))
    a, b = (shared + 0.01 * rng.normal(size=(3, 100)) for _ in range(2))
    draws = Draws(3, 500)
    paired = difference(a, b, draws, "era")
    unpaired = estimate(0, draws.means(a, "era") - draws.means(b, "another"))
    assert 0 < 20 * (paired.high - paired.low) < unpaired.high - unpaired.low


def test_intervals_are_those_of_scipy(rng):
    a, b = rng.normal(0.3, 1, 40), rng.exponential(1, 40)
    ours = difference(a[None], b[None], Draws(1, 20_000), "era")
    theirs = stats.bootstrap(
        (a, b),
        lambda a, b, axis: a.mean(axis) - b.mean(axis),
        paired=True,
        method="percentile",
        n_resamples=20_000,
        rng=rng,
    )
    close = 0.07 * theirs.standard_error
    assert ours.value == (a - b).mean()
    wider = [ours.value + stretch(40) * (end - ours.value) for end in theirs.confidence_interval]
    assert ours[1:3] == pytest.approx(wider, abs=close)


def test_an_interval_leaves_out_the_fortieth_at_each_end():
    assert estimate(7, np.arange(999)[::-1])[:3] == (7, 24, 974)
    assert estimate(0, np.array([2.0, 1.0]))[:3] == (0, 1, 2)


def test_p_counts_the_rarer_side_and_the_data_once_more():
    assert p_value(np.array([1.0] * 95 + [-1.0] * 4)) == 0.1
    assert p_value(np.array([-1.0] * 95 + [1.0] * 4)) == 0.1
    # A tie with 0 is no evidence for either side.
    assert p_value(np.array([1.0] * 95 + [0.0] * 4)) == 0.1
    assert p_value(np.ones(99)) == 0.02
    assert p_value(np.zeros(99)) == 1


@given(st.lists(st.integers(-3, 8), min_size=39, max_size=300))
def test_p_is_at_most_5_percent_where_the_interval_leaves_out_0(replicates):
    replicates = np.array(replicates, dtype=float)
    low, high = estimate(0, replicates)[1:3]
    assert (p_value(replicates) <= 0.05) == (low > 0 or high < 0)


def test_p_is_uniform_where_nothing_differs(rng):
    draws = Draws(1, 999)
    p = [difference(rng.normal(size=(1, 60)), rng.normal(size=(1, 60)), draws, "era").p for _ in range(800)]
    assert stats.kstest(p, "uniform").statistic < 0.06


@pytest.mark.parametrize(
    "seeds, by_seed, low, high",
    [(3, 1, 0.93, 0.99), (5, 1, 0.93, 0.98), (10, 1, 0.92, 0.97), (5, 0.3, 0.94, 0.995), (3, 0.05, 0.94, 1)],
)
def test_intervals_hold_the_true_difference_as_often_as_is_said(rng, seeds, by_seed, low, high):
    draws, held, trials = Draws(seeds, 999), 0, 800
    for _ in range(trials):
        a, b = (by_seed * rng.normal(size=(seeds, 1)) + rng.normal(size=(2, seeds, 40)) for _ in range(2))
        shared = rng.normal(size=40)
        result = difference(0.5 + shared + a.sum(0), shared + b.sum(0), draws, "era")
        held += result.low <= 0.5 <= result.high
    assert low <= held / trials <= high


def test_gain_is_a_ratio_of_means(rng):
    a, b = 1 + 0.1 * rng.normal(size=(3, 50)), 2 + 0.1 * rng.normal(size=(3, 50))
    # A unit in which B loses next to nothing would decide a mean of ratios.
    b[:, 0] = 1e-9
    draws = Draws(3, 999)
    result = gain(a, b, draws, "era")
    naive = sorted(1 - x / y for x, y in zip(draws.means(a, "era"), draws.means(b, "era"), strict=True))
    assert result[:3] == pytest.approx((1 - a.sum() / b.sum(), naive[24], naive[-25]))
    assert 0.4 < result.low < result.value < result.high < 0.55
    assert result.p == 0.002
    assert gain(b, b, draws, "era") == (0, 0, 0, 1)


def test_no_gain_where_the_other_loses_nothing_for_sure(rng):
    draws, a = Draws(2, 200), np.ones((2, 30))
    assert gain(a, rng.normal(size=(2, 30)), draws, "era") is None
    assert gain(a, np.zeros((2, 30)), draws, "era") is None
    assert gain(a, -a, draws, "era") is None
    assert gain_of_means(1, 0, np.ones(99), np.ones(99)) is None
    assert gain(a, a, draws, "era").value == 0


def test_a_replicate_in_which_the_other_loses_nothing_counts_against_a_gain():
    lost_B = np.array([-1.0, 0.0] + [2.0] * 117)
    # Of 119 two are outside at each end; at its word the first would be a gain of 2.
    result = gain_of_means(1, 2, np.ones(119), lost_B)
    assert result == (0.5, 0.5, 0.5, 0.05)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "call, words",
    [
        (lambda draws: draws.means(np.array([[1, np.nan], [1, 1]]), "era"), "era: 1 of 4 values are not finite"),
        (lambda draws: draws.means(np.array([[1, np.inf], [1, -np.inf]]), "era"), "era: 2 of 4"),
        (lambda draws: draws.means(np.ones((2, 0)), "era"), r"era: values of shape \(2, 0\)"),
        (lambda draws: draws.means(np.ones(2), "era"), r"era: values of shape \(2,\)"),
        (lambda draws: draws.means(np.ones((3, 2)), "era"), "era: values of 3 seeds, expected 2"),
        (lambda draws: difference(np.ones((2, 3)), np.ones((2, 1)), draws, "era"), r"\(2, 3\) and \(2, 1\)"),
        (lambda draws: difference(np.ones((2, 3)), np.ones((1, 3)), draws, "era"), r"\(2, 3\) and \(1, 3\)"),
        (lambda draws: difference(np.full((2, 3), np.inf), np.full((2, 3), np.inf), draws, "era"), "6 of 6"),
        (lambda draws: gain(np.ones((2, 1)), np.ones((2, 3)), draws, "era"), "same seeds and test units"),
        (lambda draws: Draws(0, 10), "0 seeds"),
        (lambda draws: Draws(1, 0), "0 resamples"),
        (lambda draws: expected_calibration_error(np.array([]), np.array([])), "0 confidences"),
        (lambda draws: expected_calibration_error(np.array([0.5]), np.array([1, 0])), "2 answers"),
        (lambda draws: expected_calibration_error(np.array([np.nan]), np.array([1])), "not between 0 and 1"),
        (lambda draws: expected_calibration_error(np.array([1.5]), np.array([1])), "not between 0 and 1"),
        (lambda draws: area([0, 1], [0, np.nan]), "finite values"),
        (lambda draws: area([0.1], [1]), "two rates"),
        (lambda draws: area([0.1, 0.1], [1, 2]), "two rates"),
    ],
)
def test_what_cannot_be_compared_is_one_line(call, words):
    with pytest.raises(Failure, match=words) as caught:
        call(Draws(2, 10))
    assert "\n" not in str(caught.value)


def test_holm_by_hand():
    # 4 x 0.005; 3 x 0.01; 2 x 0.03; 1 x 0.04, but never less than the one before.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.9]) == [1, 1]
    assert holm([0.02]) == [0.02] and holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=6))
def test_holm_is_the_closed_test_of_bonferroni(p):
    # A hypothesis is rejected where Bonferroni rejects every set of hypotheses that it is in.
    sets = [chosen for size in range(1, len(p) + 1) for chosen in combinations(range(len(p)), size)]
    expected = [max(min(1, len(s) * min(p[j] for j in s)) for s in sets if i in s) for i in range(len(p))]
    assert holm(p) == pytest.approx(expected)


def naive_calibration_error(confidence, correct, bins):
    total = 0.0
    for b in range(bins):
        inside = [i for i, c in enumerate(confidence) if b / bins < c <= (b + 1) / bins or (b == 0 and c == 0)]
        if inside:
            distance = sum(correct[i] for i in inside) / len(inside) - sum(confidence[i] for i in inside) / len(inside)
            total += len(inside) / len(confidence) * abs(distance)
    return total


@given(st.lists(st.tuples(st.integers(0, 64), st.booleans()), min_size=1, max_size=40), st.sampled_from([1, 4, 16]))
def test_calibration_error_is_that_of_a_loop(answers, bins):
    # Confidences and edges in 64ths: edges are hit, and exactly.
    confidence, correct = np.array([c / 64 for c, _ in answers]), np.array([right for _, right in answers])
    expected = naive_calibration_error(confidence, correct, bins)
    assert expected_calibration_error(confidence, correct, bins) == pytest.approx(expected, abs=1e-12)


def test_calibration_error_at_the_ends():
    assert expected_calibration_error(np.array([1.0, 0.0]), np.array([True, False])) == 0
    assert expected_calibration_error(np.array([1.0, 0.0]), np.array([False, True])) == 1
    assert expected_calibration_error(np.array([0.75]), np.array([1])) == 0.25
    # 0.95 and 0.85 are in bins of their own: errors do not cancel; in one bin they do.
    both = np.array([0.95, 0.85]), np.array([0, 1])
    assert expected_calibration_error(*both) == pytest.approx((0.95 + 0.15) / 2)
    assert expected_calibration_error(*both, bins=1) == pytest.approx(0.4)


def test_area_is_the_mean_height():
    assert area([0.1, 0.3], [2, 2]) == 2
    assert area([0, 0.1, 0.4], [0, 1, 1]) == pytest.approx((0.05 + 0.3) / 0.4)
    assert area([0.4, 0, 0.1], [1, 0, 1]) == area([0, 0.1, 0.4], [0, 1, 1])
    x = np.sort(np.random.default_rng(0).random(50))
    assert area(x, np.sin(x)) == pytest.approx((np.cos(x[0]) - np.cos(x[-1])) / (x[-1] - x[0]), abs=1e-3)


def test_units_of_a_group_are_drawn_together_and_the_mean_is_over_those_drawn(rng):
    groups, values = np.array([0, 0, 0, 1, 2, 2]), rng.normal(size=(2, 6))
    draws = Draws(2, 300, {"era": groups})
    found = draws.means(values, "era")
    count_RU, _ = draws._drawn["era", 6]
    assert (count_RU[:, [0, 0, 4]] == count_RU[:, [1, 2, 5]]).all()
    assert (count_RU[:, [0, 3, 4]].sum(1) == 3).all()
    weight_RS = draws._weight_RS
    for r in range(300):
        mean_S = [sum(count_RU[r, u] * values[s, u] for u in range(6)) / count_RU[r].sum() for s in range(2)]
        mean_S = [values[s].mean() + stretch(3) * (mean_S[s] - values[s].mean()) for s in range(2)]
        assert found[r] == pytest.approx(sum(weight_RS[r, s] * mean_S[s] for s in range(2)), rel=1e-4)
    assert draws.means(values, "other") == pytest.approx(Draws(2, 300).means(values, "other"))


def test_groups_widen_the_interval_of_values_that_are_alike_in_them(rng):
    values = np.repeat(rng.normal(size=20), 10)[None]
    alone, grouped = (
        estimate(values.mean(), Draws(1, 2000, groups).means(values, "era")) for groups in ({}, {"era": np.arange(200) // 10})
    )
    # The deviation of a mean of 20, not of 200.
    assert (grouped.high - grouped.low) / (alone.high - alone.low) == pytest.approx(stretch(20) * np.sqrt(10), rel=0.15)
    assert grouped.high - grouped.low == pytest.approx(stretch(20) * 2 * 1.96 * values.std() / np.sqrt(20), rel=0.1)


def test_of_a_single_document_the_units_are_drawn(rng):
    values = rng.normal(size=(2, 6))
    alone = Draws(2, 300, {"era": np.full(6, 3)}).means(values, "era")
    assert (alone == Draws(2, 300).means(values, "era")).all()
    # Numbers that no unit has are nothing that could be drawn.
    gaps = Draws(2, 300, {"era": np.array([0, 0, 5, 5, 9, 9])}).means(values, "era")
    assert (gaps == Draws(2, 300, {"era": np.arange(6) // 2}).means(values, "era")).all()


@pytest.mark.parametrize("groups", [np.arange(5), np.array(1), np.ones((6, 2), int), np.ones(6), np.arange(6) - 1])
def test_groups_of_other_units_are_an_error(groups):
    with pytest.raises(Failure, match="era: 6 units, but not as many numbers of groups"):
        Draws(1, 50, {"era": groups}).means(np.ones((1, 6)), "era")
