import dataclasses

import numpy as np
import pytest

from pipeline.evaluation.statistics import Estimate
from pipeline.evaluation.summary import Spread, measures, severity_area, spread, timings

PHASES = ("train", "finetune", "infer")


@pytest.fixture(scope="module")
def rows(grid):
    return {measure.name: measure for measure in measures(grid) if not measure.name.startswith("- ")}


def test_a_spread_is_the_deviation_over_seeds():
    assert spread([1.0, 2.0, 3.0]) == Spread(2.0, 1.0)
    assert spread([1.5]) == Spread(1.5, None)
    assert spread(None) is None


def test_scores_of_the_stages(rows):
    bits = rows["test bits per character"].values["smoe"]
    assert bits.value == pytest.approx(1.725) and bits.low < 1.725 < bits.high
    accuracy = rows["era: test accuracy %"].values["dense"]
    assert accuracy.value == pytest.approx(0.785) and accuracy.low < 0.785 < accuracy.high
    assert rows["era: test accuracy %"].note == "TF-IDF 79.0"
    assert rows["codebook perplexity"].values == {"vqmoe": Spread(6.5, 0.0), "smoe": None, "dense": None}


def test_what_noise_costs_has_an_interval_around_the_naive_mean(grid, rows):
    found = rows["bits per token lost to noise"].values["vqmoe"]
    names = [f"language/discrete/{kind}/{rate}/lost" for kind in ("swap", "delete", "keyboard") for rate in (0.02, 0.1)]
    naive = np.mean([np.mean([units[name] for name in names]) for units in grid.units["vqmoe"]])
    assert found.value == pytest.approx(naive)
    assert found.low < naive < found.high
    attack = np.mean([np.mean([units[f"era/router/greedy/{rate}/lost"] for rate in (0.02, 0.1)]) for units in grid.units["smoe"]])
    assert rows["era: accuracy points lost to attack"].values["smoe"].value == pytest.approx(attack)
    shift = np.mean([units["era/router/austen/0.0/lost"] for units in grid.units["smoe"]])
    assert rows["era: accuracy points lost to shift to austen"].values["smoe"].value == pytest.approx(shift)


def test_the_other_mode_is_of_methods_that_have_one(grid):
    found = measures(grid)
    after = found[[measure.name for measure in found].index("bits per token lost to noise") + 1]
    assert after.name == "- in the mode of pre-training"
    assert set(after.values) == {"vqmoe"}
    naive = np.mean(
        [
            np.mean([units[f"language/both/{kind}/{rate}/lost"] for units in grid.units["vqmoe"]])
            for kind in ("swap", "delete", "keyboard")
            for rate in (0.02, 0.1)
        ]
    )
    assert after.values["vqmoe"].value == pytest.approx(naive)


def test_the_area_is_that_of_trapezoids_from_clean_on(grid, rows):
    areas = []
    for units in grid.units["dense"]:
        for kind in ("swap", "delete", "keyboard"):
            clean, low, high = (
                units[f"era/dense/{kind}/{rate}/score"].mean() if rate else units["era/dense/clean/0.0/score"].mean()
                for rate in (0, 0.02, 0.1)
            )
            areas.append(((clean + low) / 2 * 0.02 + (low + high) / 2 * 0.08) / 0.1)
    assert severity_area(grid, "dense", "era").values_SU.mean() == pytest.approx(np.mean(areas))
    assert rows["era: mean accuracy % over severities"].values["dense"].value == pytest.approx(np.mean(areas))


@pytest.mark.parametrize("model, name, pick", [("language", "worst bits per token", max), ("era", "era: worst accuracy %", min)])
def test_the_worst_case_is_named(grid, rows, model, name, pick):
    means = {
        (kind, rate): np.mean([units[f"{model}/router/{kind}/{rate}/score"] for units in grid.units["smoe"]])
        for kind in ("swap", "delete", "keyboard")
        for rate in (0.02, 0.1)
    }
    kind, rate = pick(means, key=means.get)
    measure = rows[f"{name} under noise"]
    assert measure.values["smoe"].value == pytest.approx(means[kind, rate])
    assert measure.labels["smoe"] == f"{kind} {100 * rate:g} %"


def test_fluctuation_is_that_of_the_last_third_of_validations(rows):
    assert rows["fluctuation of routing while training %"].values["smoe"].value == pytest.approx(40 / 1200 + 0.01)
    assert rows["fluctuation of routing while training %"].values["dense"] is None


def test_no_timing_is_among_the_measures_and_timings_know_the_modes(grid, rows):
    assert not any("per second" in name or "memory" in name for name in rows)
    found = {measure.name: measure.values for measure in timings(grid)}
    assert found["training in the mode of pre-training, thousand tokens per second"]["vqmoe"] == Estimate(
        10_000 / 1.6, 9_500 / 1.6, 10_500 / 1.6
    )
    assert found["fine-tuning in the mode of inference, thousand tokens per second"]["vqmoe"].value == pytest.approx(10_000 / 1.2)
    assert found["fine-tuning in the mode of pre-training, thousand tokens per second"].keys() == {"vqmoe"}
    assert found["inference in the mode of inference, peak memory MiB"]["dense"] == Spread(512.0, None)


def test_memory_that_the_system_does_not_tell_is_left_out(grid):
    untold = {phase: {"dense": grid.compute["dense"][phase]["dense"] | {"peak_memory_mib": None}} for phase in PHASES}
    other = dataclasses.replace(grid, compute=grid.compute | {"dense": grid.compute["dense"] | untold})
    found = {measure.name: measure.values for measure in timings(other)}
    assert found["inference in the mode of inference, peak memory MiB"].keys() == {"vqmoe", "smoe"}
    assert "dense" in found["inference in the mode of inference, thousand tokens per second"]


def test_rows_are_those_of_the_unit_there_is(grid):
    def words(metrics):
        return {
            name.replace("bpc", "perplexity"): words(value) if isinstance(value, dict) else value
            for name, value in metrics.items()
        }

    results = {key: {m: list(map(words, found)) for m, found in by.items()} for key, by in grid.results.items()}
    references = grid.prepared["references"] | {"perplexity": {"unigram": 950.2}}
    other = dataclasses.replace(grid, unit="perplexity", results=results, prepared=grid.prepared | {"references": references})
    first, second, *rest = measures(other)
    assert (first.name, first.digits, first.note) == ("test perplexity", 2, "unigram 950")
    assert second.name == "- discrete path alone"
    assert not any("per character" in measure.name for measure in rest)
    assert any(measure.name == "era: valid perplexity, before warm-up" for measure in rest)
