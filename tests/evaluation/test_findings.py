import dataclasses

import numpy as np
import pytest

from pipeline.evaluation.findings import claims, flops_saving, gains, pairs, time_saving, timed_claims, too_few
from pipeline.evaluation.statistics import holm
from stages.report import read
from tests.stages import made_up

FIRST = ("swap", 0.02)


@pytest.fixture(scope="module")
def rivals(tmp_path_factory):
    """A grid with two other routing methods."""
    params = made_up.params(methods=("dense", "smoe", "xmoe", "vqmoe"), tasks=("era",))
    return read(params, made_up.write(tmp_path_factory.mktemp("rivals"), params))


def test_the_gain_is_one_less_the_ratio_of_mean_losses(grid):
    found = {claim.claim: claim for claim in claims(grid)}
    ours, theirs = (grid.sample(m, "language", "noise", "lost").values_SU.mean() for m in ("vqmoe", "smoe"))
    claim = found["28 % more robust than smoe: language model under noise"]
    assert claim.measured == f"{100 * (1 - ours / theirs):.1f} %"
    assert claim.verdict == "supported"
    assert not any("than dense" in name for name in found)


def test_gains_are_of_each_condition_and_both_ways(grid):
    rows = gains(grid)
    pairs_of_methods = {(row["method"], row["over"]) for row in rows}
    assert len(pairs_of_methods) == len(grid.methods) * (len(grid.methods) - 1)
    (row,) = (
        r for r in rows if (r["model"], r["kind"], r["rate"], r["method"], r["over"]) == ("language", *FIRST, "vqmoe", "smoe")
    )
    ours, theirs = (grid.sample(m, "language", "noise", "lost", only=FIRST).values_SU.mean() for m in ("vqmoe", "smoe"))
    assert row["gain"] == pytest.approx(1 - ours / theirs)
    assert row["low"] < row["gain"] < row["high"]


def test_a_pair_has_the_gain_of_what_is_lost_alone(grid):
    for pair in pairs(grid):
        # Not of all classifiers' losses: of some the interval reaches 0.
        assert pair.gain is None or "lost" in pair.measure
    lost = next(pair for pair in pairs(grid) if pair.measure == "language model: bits per token lost to noise")
    ours, theirs = (grid.sample(m, "language", "noise", "lost").values_SU.mean() for m in (lost.first, lost.second))
    assert lost.gain.value == pytest.approx(1 - ours / theirs)


def test_the_headline_is_against_the_mean_of_the_other_routing_methods(rivals):
    (headline,) = (
        c for c in claims(rivals) if c.claim.endswith("the mean of the other routing methods: language model under noise")
    )
    ours, *theirs = (rivals.sample(m, "language", "noise", "lost").values_SU.mean() for m in ("vqmoe", "smoe", "xmoe"))
    assert headline.measured == f"{100 * (1 - ours / np.mean(theirs)):.1f} %"
    assert claims(rivals)[0] == headline
    attacked = [c.claim for c in claims(rivals) if "attack" in c.claim]
    # The mean of the others, and each of them; of the classifier, which alone was attacked.
    assert len(attacked) == 3 and all(": era under" in name for name in attacked)


def test_flops_are_counted_and_need_no_seeds(grid, tmp_path):
    found = {claim.claim: claim for claim in claims(grid)}
    assert found["28 % less compute to fine-tune than its own mode both"][1:4] == ("25.0 %", "", "not supported")
    assert found["28 % less compute to fine-tune than smoe"].measured == "20.0 %"
    assert flops_saving(grid.compute, ("vqmoe", "discrete"), ("vqmoe", "both"), "finetune") == pytest.approx(1 - 1.2 / 1.6)
    params = made_up.params(seeds=(0,), tasks=("era",))
    verdicts = {c.claim: c.verdict for c in claims(read(params, made_up.write(tmp_path, params)))}
    assert verdicts["28 % less compute to fine-tune than smoe"] == "not supported"
    assert {v for name, v in verdicts.items() if "compute" not in name} == {"undecided"}


def test_time_is_a_claim_apart(grid):
    assert not any("time" in claim.claim for claim in claims(grid))
    (own,) = timed_claims(grid)
    assert own[:4] == ("28 % less time to fine-tune than its own mode both", "31.0 %", "[29.0, 33.0]", "supported")
    assert own[5:] == (0.31, 0.29, 0.33)
    assert time_saving(grid.compute, "smoe", "finetune") is None


def test_accuracy_against_the_best_and_consistency_against_the_mean(rivals):
    found = {claim.claim: claim for claim in claims(rivals)}
    accuracy = {m: rivals.sample(m, "era", "test", "score").values_SU.mean() for m in ("vqmoe", "smoe", "xmoe")}
    best = max(("smoe", "xmoe"), key=accuracy.get)
    claim = found[f"strong fine-tuning: accuracy on era above {best}, the best other routing method"]
    assert claim.measured == f"{100 * (accuracy['vqmoe'] - accuracy[best]):z.1f} points"
    steady = found["routing more consistent under noise than the mean of the other routing methods: language model"]
    # Of places 3, 1 and 2 in the grid, 5 points each.
    assert (steady.measured, steady.verdict) == ("-7.5 points", "not supported")


def test_a_grid_without_vqmoe_has_no_claims(grid):
    other = dataclasses.replace(grid, methods=("smoe", "dense"))
    assert claims(other) == timed_claims(other) == []


def test_pairs_are_differences_of_means_and_vqmoe_comes_first(rivals):
    found = pairs(rivals)
    measures = list(dict.fromkeys(pair.measure for pair in found))
    assert measures == [
        "language model: test bits per token",
        "language model: bits per token lost to noise",
        "era: test accuracy points",
        "era: accuracy points lost to noise",
        "era: accuracy points lost to the adaptive attack",
    ]
    for measure, family, what in zip(measures[2:], ("test", "noise", "attack"), ("score", "lost", "lost"), strict=True):
        same = [pair for pair in found if pair.measure == measure]
        assert [(p.first, p.second) for p in same][:3] == [("vqmoe", "dense"), ("vqmoe", "smoe"), ("vqmoe", "xmoe")]
        assert len(same) == 6
        for pair in same:
            a, b = (rivals.sample(m, "era", family, what).values_SU.mean() for m in (pair.first, pair.second))
            assert pair.estimate.value == pytest.approx(a - b)
        # Holm: the smallest p times the number of pairs of the measure.
        smallest = min(same, key=lambda pair: pair.estimate.p)
        assert smallest.p_holm == pytest.approx(min(1, 6 * smallest.estimate.p))


def test_resamples_too_few_for_so_many_claims_are_said(rivals):
    robust = len([c for c in claims(rivals) if "more robust" in c.claim and c.measured])
    told = f"too few for {robust} tests; report.resamples: {40 * robust} or more"
    for resamples, said in ((40 * robust, ""), (40 * robust - 1, told)):
        found = [c.note for c in claims(dataclasses.replace(rivals, resamples=resamples)) if "more robust" in c.claim]
        assert found and all((said in note) if said else ("resamples" not in note) for note in found)
    # As many p values, all the smallest that so many replicates have.
    assert holm([2 / (40 * robust)] * robust)[0] == pytest.approx(0.05)


def test_too_few_seeds_are_said():
    assert [too_few(seeds) for seeds in (1, 2, 3)] == ["1 seed: fewer than 3", "2 seeds: fewer than 3", ""]
