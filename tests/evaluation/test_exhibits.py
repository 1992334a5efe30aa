import matplotlib.pyplot as plt
import numpy as np
import pytest
from scipy.stats import spearmanr

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
        *(f"severity-{model}" for model in models),
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


def test_an_attack_starts_from_the_clean_score_of_its_own_passages(found, grid):
    line = panels(found["attack"])["era"].lines[grid.methods.index("smoe")]
    own = [units["era/router/clean/0.0/score"][:10] for units in grid.units["smoe"]]
    assert line.get_ydata()[0] == pytest.approx(100 * np.mean(own))
    assert list(panels(found["attack"])) == list(grid.tasks)


def test_a_cell_of_the_heat_map_is_the_mean_over_severities_and_seeds(found, grid):
    image = panels(found["degradation"])["era"].images[0].get_array()
    names = [f"era/dense/keyboard/{rate}/lost" for rate in (0.02, 0.1)]
    naive = 100 * np.mean([[units[name].mean() for name in names] for units in grid.units["dense"]])
    assert image[grid.methods.index("dense"), 2] == pytest.approx(naive)


def test_the_correlation_is_said_with_its_n_and_what_it_does_not_show(found, grid):
    x, y = ([row[axis] for row in found["consistency"].rows if row["model"] == "era"] for axis in ("consistency", "degradation"))
    assert len(x) == 6
    r = spearmanr(x, y).statistic
    assert f"era: Spearman's rank correlation {r:.2f} (n = 6" in found["consistency"].caption
    assert "would not show that one causes the other" in found["consistency"].caption


@pytest.mark.parametrize(
    "y, said",
    [
        ([6, 5, 4, 3, 2, 1], "the less is lost"),
        ([1, 2, 3, 4, 5, 6], "the more is lost"),
        ([1, 6, 2, 5, 3, 4], "does not explain"),
        ([1, 2, 3], "too few different points (n = 3)"),
        ([1] * 6, "too few different points (n = 6)"),
    ],
)
def test_what_a_correlation_means(y, said):
    text = module._correlation([Point(x, value) for x, value in enumerate(y)]).replace("the routing, ", "")
    assert said.removeprefix("the ") in text


def test_fluctuation_has_no_point_where_there_was_no_validation_before(found):
    axes = panels(found["routing"])["fluctuation"]
    assert axes.lines[0].get_xdata().tolist() == [800, 1200]
    # Mean over layers 0, 1 and 2, in percent.
    assert axes.lines[0].get_ydata().tolist() == pytest.approx([100 * (40 / step + 0.01) for step in (800, 1200)])
    assert [text.get_text() for text in found["routing"].figure.legends[0].get_texts()] == ["vqmoe", "smoe"]


def test_score_against_compute_has_both_modes(found):
    rows = [row for row in found["accuracy-compute"].rows if (row["method"], row["seed"]) == ("vqmoe", 0)]
    assert [(row["measure"], row["mode"], row["mflops"]) for row in rows] == [
        ("test bpc", "both", 1.6),
        ("test bpc", "discrete", 1.2),
        ("era accuracy", "discrete", 1.2),
        ("banking77 accuracy", "discrete", 1.2),
    ]
    assert [row["score"] for row in rows] == pytest.approx([1.7, 1.72, 80, 80])


def test_confusion_of_the_first_seed_unless_there_are_too_many_classes(found, grid, monkeypatch):
    (axes,) = (axes for title, axes in panels(found["confusion-era"]).items() if title == "smoe")
    counts = np.array([row["passages"] for row in found["confusion-era"].rows if row["method"] == "smoe"]).reshape(3, 3)
    assert np.allclose(axes.images[0].get_array(), 100 * counts / counts.sum(1, keepdims=True))
    monkeypatch.setattr(module, "CLASSES", 2)
    assert not list(module._confusion(grid, "era"))


def test_one_method_without_choice_has_fewer_figures(tmp_path):
    params = made_up.params(methods=("dense",), seeds=(0,), tasks=("era",))
    alone = read(params, made_up.write(tmp_path, params, kinds=("swap",), rates=(0.1,)))
    names = [exhibit.name for exhibit in exhibits(alone)]
    plt.close("all")
    assert "saving" not in names and "consistency" not in names and "routing" not in names and "code-load-era" not in names
    assert {"training", "severity-era", "degradation", "accuracy-compute"} <= set(names)
