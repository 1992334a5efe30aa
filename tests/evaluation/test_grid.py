import dataclasses
import re

import numpy as np
import pytest

from pipeline.errors import Failure


def test_a_sample_is_the_mean_over_conditions_by_seed_and_unit(grid):
    sample = grid.sample("smoe", "era", "noise", "lost")
    for s, units in enumerate(grid.units["smoe"]):
        for u in range(30):
            values = [
                units[f"era/router/{kind}/{rate}/lost"][u] for kind in ("swap", "delete", "keyboard") for rate in (0.02, 0.1)
            ]
            assert sample.values_SU[s, u] == pytest.approx(sum(values) / 6)
    assert sample.values_SU.mean() == pytest.approx(
        grid.by_seed(grid.scores("smoe", "era", "noise"), "smoe", "degradation").mean()
    )


def test_the_mode_of_inference_unless_another_is_named(grid):
    assert grid.modes("vqmoe") == ("both", "discrete")
    assert grid.modes("dense") == ("dense", "dense")
    name = "language/{}/clean/0.0/score"
    for mode, asked in (("discrete", None), ("both", "both")):
        found = grid.sample("vqmoe", "language", "clean", "score", asked).values_SU
        assert (found == [units[name.format(mode)] for units in grid.units["vqmoe"]]).all()
    assert {row["mode"] for row in grid.layers("vqmoe", "language")} == {"discrete"}


def test_only_the_same_texts_are_paired(grid):
    clean, noise = (grid.sample("smoe", "era", family, "score") for family in ("clean", "noise"))
    attack = grid.sample("smoe", "era", "attack", "score")
    shifts = [grid.sample("smoe", "era", "shift", "score", only=(kind, 0.0)) for kind in ("raw", "austen")]
    assert clean.units == noise.units
    assert len({one.units for one in (clean, attack, *shifts)}) == 4
    assert grid.sample("smoe", "language", "attack", "score") is None


def test_the_whole_test_split_by_mode_and_passage(grid):
    both, discrete = (grid.sample("vqmoe", "language", "test", "score", mode) for mode in ("both", None))
    assert (discrete.values_SU - both.values_SU) == pytest.approx(np.full((3, 40), 0.02))
    assert grid.sample("smoe", "era", "test", "score").values_SU.mean(1) == pytest.approx([0.79, 0.795, 0.8])
    assert grid.sample("smoe", "era", "test", "score").units == "era/test"


def test_passages_of_one_document_are_drawn_together(grid):
    sample = grid.sample("smoe", "era", "clean", "score")
    one, other, apart = (grid.draws.means(np.tile(np.eye(30)[place], (3, 1)), sample.units) for place in (0, 1, 3))
    # Two passages of the same three: drawn as often as each other.
    assert (one == other).all() and (one != apart).any()
    assert grid.draws.means(np.ones((3, 10)), grid.sample("smoe", "era", "attack", "score").units) == pytest.approx(1)


def test_a_shift_of_the_language_model_is_drawn_in_both_texts(grid):
    found = grid.shift("smoe", "language", "austen")
    scored, clean = (
        grid.sample("smoe", "language", "shift", "score", only=("austen", 0.0)),
        grid.sample("smoe", "language", "clean", "score"),
    )
    assert found.value == pytest.approx(scored.values_SU.mean() - clean.values_SU.mean())
    replicates = grid.draws.means(scored.values_SU, scored.units) - grid.draws.means(clean.values_SU, clean.units)
    assert replicates.min() < found.low < found.value < found.high < replicates.max()
    alone = grid.interval(grid.sample("smoe", "language", "shift", "lost", only=("austen", 0.0)))
    assert (found.low, found.high) != (alone.low, alone.high)


def test_methods_under_other_conditions_are_an_error(grid):
    def left(keep):
        return dataclasses.replace(grid, tables=grid.tables | {"scores": [row for row in grid.tables["scores"] if keep(row)]})

    grid.check()
    lost = {"method": "smoe", "seed": 1, "model": "language", "kind": "delete", "rate": 0.1}
    with pytest.raises(Failure, match=r"scores of smoe, seed 1: language has no delete at 0\.1; run `dvc repro`"):
        left(lambda row: not lost.items() <= row.items()).check()
    with pytest.raises(Failure, match="scores of smoe, seed 0: era has no clean at 0"):
        left(lambda row: row["model"] != "era" or row["method"] != "smoe").check()
    clean = {"method": "vqmoe", "seed": 2, "mode": "both", "kind": "clean"}
    with pytest.raises(Failure, match="scores of vqmoe, seed 2: language has nothing clean in mode both"):
        left(lambda row: not clean.items() <= row.items()).check()
    with pytest.raises(Failure, match="scores of vqmoe: none of the pre-trained model"):
        left(lambda row: False).modes("vqmoe")


def test_a_column_that_is_empty_has_no_mean(grid):
    assert grid.by_seed(grid.scores("dense", "era", "noise"), "dense", "consistency") is None
    assert grid.by_seed(grid.scores("smoe", "era", "noise"), "smoe", "consistency") == pytest.approx([0.9 - 0.06] * 3)


def test_other_units_than_those_of_all_are_an_error(grid):
    def changed(units):
        own = grid.units["smoe"]
        return dataclasses.replace(grid, units=grid.units | {"smoe": [own[0], own[1] | units, own[2]]})

    name = "era/router/swap/0.1/score"
    for wrong_U in (np.ones(29), np.ones((30, 1)), np.array(1.0)):
        with pytest.raises(Failure, match=rf"units of smoe, seed 1: {name} is of shape {re.escape(str(wrong_U.shape))}"):
            changed({name: wrong_U}).check()
    with pytest.raises(Failure, match="units of smoe, seed 1: toy/groups are not in all units"):
        changed({"toy/groups": np.arange(30)}).check()


def test_units_that_are_not_those_of_the_scores_are_an_error(grid):
    for broken in ({}, {name: values[:-1] for name, values in grid.units["smoe"][0].items()}):
        other = dataclasses.replace(grid, units={"smoe": [broken, *grid.units["smoe"][1:]]})
        with pytest.raises(Failure, match="units of smoe"):
            other.sample("smoe", "era", "noise", "lost")
    bad = {name: np.full(values.shape, np.nan) for name, values in grid.units["smoe"][0].items()}
    other = dataclasses.replace(grid, units=grid.units | {"smoe": [bad, *grid.units["smoe"][1:]]})
    with pytest.raises(Failure, match="not finite"):
        other.interval(other.sample("smoe", "era", "noise", "lost"))
