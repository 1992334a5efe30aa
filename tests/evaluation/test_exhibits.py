import dataclasses
import itertools

import matplotlib.pyplot as plt
import numpy as np
import pytest
from scipy.stats import spearmanr

from pipeline.errors import Failure
from pipeline.evaluation import exhibits as module
from pipeline.evaluation.exhibits import exhibits
from pipeline.evaluation.plots import Point
from stages.report import read
from tests.stages import made_up


@pytest.fixture(scope="module")
def found(grid):
    with plt.rc_context({"figure.max_open_warning": 0}):
        yield {exhibit.name: exhibit for exhibit in exhibits(grid)}
    plt.close("all")


def panels(exhibit):
    return {axes.get_title(): axes for axes in exhibit.figure.axes if axes.get_visible()}


def test_every_figure_of_the_report_and_the_runs_behind_each(found, grid):
    models = ("language", *grid.tasks)
    assert list(found) == [
        "training",
        *(f"{what}-{model}" for model in models for what in ("severity", "relative")),
        *("attack", "degradation", "consistency", "routing", "layers"),
        *(f"{what}-load-{model}" for model in models for what in ("expert", "code")),
        *("accuracy-compute", "saving", *(f"confusion-{task}" for task in grid.tasks)),
    ]
    for exhibit in found.values():
        assert exhibit.caption.endswith(".")
        assert exhibit.rows and all(row["method"] in grid.methods and row["run_id"] for row in exhibit.rows)


def test_a_curve_goes_from_clean_on_and_so_do_its_rows(found, grid):
    axes = panels(found["severity-era"])["delete"]
    line = axes.lines[grid.methods.index("smoe")]
    assert line.get_xdata().tolist() == [0, 2, 10]
    names = [f"era/router/{name}/score" for name in ("clean/0.0", "delete/0.02", "delete/0.1")]
    naive = [100 * np.mean([units[name] for units in grid.units["smoe"]]) for name in names]
    assert line.get_ydata() == pytest.approx(naive)
    rows = [row for row in found["severity-era"].rows if (row["method"], row["kind"]) == ("smoe", "delete")]
    assert [(row["rate"], row["seed"]) for row in rows] == [(rate, seed) for rate in (0.0, 0.02, 0.1) for seed in grid.seeds]
    assert rows[0]["run_id"] == grid.runs["robustness", None]["smoe"][0]


def test_what_is_lost_beside_the_mean_of_the_methods_is_paired(found, grid):
    axes = panels(found["relative-language"])["delete"]
    line = axes.lines[grid.methods.index("vqmoe")]
    assert line.get_xdata().tolist() == [2, 10]
    names = {"vqmoe": "discrete", "smoe": "router", "dense": "dense"}
    lost = {m: [units[f"language/{mode}/delete/0.1/lost"] for units in grid.units[m]] for m, mode in names.items()}
    naive = np.mean(lost["vqmoe"]) - np.mean([np.mean(lost[m]) for m in names])
    assert line.get_ydata()[1] == pytest.approx(naive)
    row = next(r for r in found["relative-language"].rows if (r["method"], r["kind"], r["rate"]) == ("vqmoe", "delete", 0.1))
    assert row["relative"] == pytest.approx(np.mean(lost["vqmoe"][0]) - np.mean([np.mean(lost[m][0]) for m in names]))
    # What all methods lose on a text alike is in none of the differences, so the band is narrow.
    units = {
        m: [{k: v + np.linspace(0, 9, v.size) if k.endswith("/lost") else v for k, v in u.items()} for u in own]
        for m, own in grid.units.items()
    }
    same = module._relative(dataclasses.replace(grid, units=units), "language")
    (other,) = (r for r in same.rows if (r["method"], r["kind"], r["rate"], r["seed"]) == ("vqmoe", "delete", 0.1, 0))
    assert [other[key] for key in ("mean", "low", "high")] == pytest.approx([row[key] for key in ("mean", "low", "high")])


def test_a_severity_is_a_share_of_what_was_changed(grid, monkeypatch):
    assert module._changed(grid, "era", "word") == "words changed, %"
    assert module._changed(grid, "language", "swap") == "characters changed, %"
    monkeypatch.setitem(grid.__dict__, "unit", "perplexity")
    assert module._changed(grid, "language", "word") == "tokens changed, %"
    assert module._changed(grid, "era", "swap") == "characters changed, %"


def test_an_attack_is_beside_as_many_random_replacements(found, grid, tmp_path):
    assert list(panels(found["attack"])) == list(grid.tasks)
    axes = panels(found["attack"])["era"]
    lost = [100 * np.mean([units[f"era/router/greedy/{rate}/lost"] for units in grid.units["smoe"]]) for rate in (0.02, 0.1)]
    assert axes.lines[grid.methods.index("smoe")].get_ydata() == pytest.approx([0, *lost])
    assert not any(line.get_linestyle() == "--" for line in axes.lines)
    params = made_up.params(methods=("smoe",), tasks=("era",))
    other = read(params, made_up.write(tmp_path, params, kinds=("replace",)))
    (exhibit,) = module._attack(other)
    dashed, _ = (line for line in panels(exhibit)["era"].lines if line.get_linestyle() == "--")
    lost = [100 * np.mean([units[f"era/router/replace/{rate}/lost"] for units in other.units["smoe"]]) for rate in (0.02, 0.1)]
    assert dashed.get_ydata() == pytest.approx([0, *lost])
    assert [text.get_text() for text in exhibit.figure.legends[0].get_texts()] == ["smoe", "random replacement"]


def test_a_cell_of_the_heat_map_is_the_mean_over_severities_and_seeds(found, grid):
    image = panels(found["degradation"])["era: noise"].images[0].get_array()
    names = [f"era/dense/keyboard/{rate}/lost" for rate in (0.02, 0.1)]
    naive = 100 * np.mean([[units[name].mean() for name in names] for units in grid.units["dense"]])
    assert image[grid.methods.index("dense"), 2] == pytest.approx(naive)
    labels = [text.get_text() for text in panels(found["degradation"])["era: attack and shift"].get_xticklabels()]
    assert sorted(labels) == ["adaptive attack", "austen", "raw text"]


def test_consistency_is_beside_the_loss_a_point_per_method(found, grid):
    axes = panels(found["consistency"])["Language model"]
    places = [line.get_xydata()[0].tolist() for line in axes.lines if line.get_marker() in "oD"]
    lost = [grid.sample(method, "language", "noise", "lost").values_SU.mean() for method in ("vqmoe", "smoe")]
    assert places == [pytest.approx([0.79, lost[0]]), pytest.approx([0.74, lost[1]])]
    assert axes.get_ylim()[0] == 0
    caption = found["consistency"].caption
    assert "era: 2 methods are too few for a correlation." in caption and "is no cause" in caption


def test_a_correlation_over_methods():
    def said(y):
        return module._correlation([Point(x, value) for x, value in enumerate(y)])

    assert said([1]) == "1 method is too few for a correlation"
    assert said([4, 3, 2, 1]) == "4 methods are too few for a correlation"
    y = [1, 6, 2, 5, 3]
    # Of all 120 orders.
    exact = np.mean([abs(spearmanr(range(5), p).statistic) >= 0.3 - 1e-9 for p in itertools.permutations(y)])
    assert said(y) == f"Spearman's rank correlation 0.30 (n = 5 methods, p = {exact:.3f})"
    assert said([5, 4, 3, 2, 1]) == "Spearman's rank correlation -1.00 (n = 5 methods, p = 0.017)"
    assert said([1] * 6) == "all methods are the same, so there is no correlation"


def test_fluctuation_has_no_point_where_there_was_no_validation_before(found):
    axes = panels(found["routing"])["fluctuation"]
    assert axes.lines[0].get_xdata().tolist() == [800, 1200]
    # Mean over layers 0, 1 and 2, in percent.
    assert axes.lines[0].get_ydata().tolist() == pytest.approx([100 * (40 / step + 0.01) for step in (800, 1200)])
    others = panels(found["routing"])["load imbalance"]
    assert axes.get_xlim() == others.get_xlim() and axes.get_xticks().tolist() == [400, 800, 1200]
    assert axes.get_ylim()[0] == others.get_ylim()[0] == 0
    assert [text.get_text() for text in found["routing"].figure.legends[0].get_texts()] == ["vqmoe", "smoe"]


def test_score_against_compute_has_both_modes(found, grid):
    rows = [row for row in found["accuracy-compute"].rows if (row["method"], row["seed"]) == ("vqmoe", 0)]
    assert [(row["measure"], row["mode"], row["mflops"]) for row in rows] == [
        ("test bits per character", "both", 1.6),
        ("test bits per character", "discrete", 1.2),
        ("test accuracy, %", "discrete", 1.2),
        ("test accuracy, %", "discrete", 1.2),
    ]
    assert [row["score"] for row in rows] == pytest.approx([1.7, 1.72, 80, 80])
    whole = grid.interval(grid.sample("vqmoe", "language", "test", "score", "both"))
    assert (rows[0]["low"], rows[0]["high"]) == whole[1:3]
    runs = [grid.runs[stage]["vqmoe"][0] for stage in (("pretrain", None), ("finetune", "era"))]
    assert [rows[1]["run_id"], rows[2]["run_id"]] == runs
    axes = panels(found["accuracy-compute"])["era"]
    bars = [collection.get_segments()[0] for collection in axes.collections]
    assert bars[0][:, 1].tolist() == [rows[2]["low"], rows[2]["high"]]
    legend = [text.get_text() for text in found["accuracy-compute"].figure.legends[0].get_texts()]
    assert {"mode of inference", "mode of pre-training"} < set(legend)


def test_perplexity_is_that_of_the_mean_bits(grid, monkeypatch):
    bits = grid.interval(grid.sample("smoe", "language", "test", "score"))
    monkeypatch.setitem(grid.__dict__, "unit", "perplexity")
    row = next(row for row in module._accuracy(grid).rows if row["method"] == "smoe")
    assert (row["measure"], row["low"]) == ("test perplexity", pytest.approx(2**bits.low))


def test_even_shares_are_said(found):
    assert "would be 12.5 %" in found["expert-load-era"].caption and "would be 6.25 %" in found["code-load-era"].caption


def test_time_is_saved_over_its_own_other_mode_alone(found):
    rows = [row for row in found["saving"].rows if row["phase"] == "finetune"]
    assert [row["against"] for row in rows] == ["vqmoe, both", "smoe, router", "dense, dense"]
    assert [row["flops_saved"] for row in rows] == pytest.approx([25, 20, 20])
    assert [row.get("time_saved") for row in rows] == [pytest.approx(31), None, None]


def test_confusion_of_the_first_seed_unless_there_are_too_many_classes(found, grid, monkeypatch):
    (axes,) = (axes for title, axes in panels(found["confusion-era"]).items() if title == "smoe")
    counts = np.array([row["examples"] for row in found["confusion-era"].rows if row["method"] == "smoe"]).reshape(3, 3)
    assert np.allclose(axes.images[0].get_array(), 100 * counts / counts.sum(1, keepdims=True))
    monkeypatch.setattr(module, "CLASSES", 2)
    assert not list(module._confusion(grid, "era"))


def test_one_method_without_choice_has_fewer_figures(tmp_path):
    params = made_up.params(methods=("dense",), seeds=(0,), tasks=("era",))
    alone = read(params, made_up.write(tmp_path, params, kinds=("swap",), rates=(0.1,)))
    names = [exhibit.name for exhibit in exhibits(alone)]
    plt.close("all")
    assert (
        "saving" not in names
        and "relative-era" not in names
        and "consistency" not in names
        and "routing" not in names
        and "code-load-era" not in names
    )
    assert {"training", "severity-era", "degradation", "accuracy-compute"} <= set(names)


def test_layers_of_unlike_load_are_an_error(grid):
    other = dataclasses.replace(grid, tables=grid.tables | {"load": grid.tables["load"][1:]})
    with pytest.raises(
        Failure, match=r"load of vqmoe, mode both: language has layers with more experts than others; run `dvc repro`"
    ):
        list(module._load(other, "language"))
