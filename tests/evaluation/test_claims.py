import pytest

from pipeline.evaluation.claims import verdict
from pipeline.evaluation.statistics import Estimate

ABOVE, BELOW, ACROSS = Estimate(0.4, 0.28, 0.5), Estimate(0.1, 0.0, 0.27), Estimate(0.3, 0.1, 0.5)


@pytest.mark.parametrize(
    "estimate, seeds, p_holm, expected",
    [
        (ABOVE, 3, None, "supported"),
        (ABOVE, 3, 0.049, "supported"),
        (BELOW, 3, None, "not supported"),
        # That a gain is no clear one makes a claim of a large one no better.
        (BELOW, 3, 0.6, "not supported"),
        (Estimate(0.28, 0.28, 0.28), None, None, "supported"),
        (Estimate(0.25, 0.25, 0.25), None, None, "not supported"),
    ],
)
def test_what_the_interval_decides(estimate, seeds, p_holm, expected):
    assert verdict(estimate, 0.28, seeds, p_holm) == (expected, "")


@pytest.mark.parametrize(
    "estimate, seeds, p_holm, note",
    [
        (None, 5, None, "what the other loses cannot be told from zero, so there is no ratio; see the difference under Pairs"),
        (ABOVE, 2, None, "2 seeds: an interval says nothing about another training run"),
        (BELOW, 1, None, "1 seed: an interval says nothing about another training run"),
        (Estimate(0.28, 0.28, 0.28), 1, None, "1 seed: an interval says nothing about another training run"),
        (ACROSS, 3, None, "the interval contains 28 %"),
        (Estimate(0.2, 0.1, 0.28), 3, 0.001, "the interval contains 28 %"),
        (ABOVE, 3, 0.05, "p is 0.05 after Holm's correction for all that was tested"),
    ],
)
def test_what_leaves_it_open_and_why(estimate, seeds, p_holm, note):
    assert verdict(estimate, 0.28, seeds, p_holm) == ("undecided", note)
