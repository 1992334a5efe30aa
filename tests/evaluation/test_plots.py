import math

import numpy as np

from pipeline.evaluation import plots
from pipeline.evaluation.plots import (
    COLOURS,
    Bars,
    Curve,
    Map,
    Panel,
    Point,
    confusion_maps,
    curves,
    heat_maps,
    points,
    save,
    saving_bars,
    share_maps,
    styles,
)
from pipeline.moe.layer import SETTINGS


def visible(figure):
    return [axes for axes in figure.axes if axes.get_visible() and axes.get_label() != "<colorbar>"]


def test_no_two_methods_look_alike_and_each_the_same_in_every_experiment(monkeypatch):
    looks = styles(SETTINGS)
    assert len({look["color"] for look in looks.values()}) == len({look["marker"] for look in looks.values()}) == len(COLOURS)
    monkeypatch.setattr(plots, "SETTINGS", (*SETTINGS, *map(str, range(30))))
    many = styles(plots.SETTINGS)
    assert len({tuple(look.values()) for look in many.values()}) == len(plots.SETTINGS)
    assert {name: many[name] for name in SETTINGS} == looks
    assert styles(["smoe", "dense"]) == {name: looks[name] for name in ("smoe", "dense")}


def test_a_panel_each_with_its_lines_and_bands_and_one_legend_for_all():
    lines = {"vqmoe": Curve([0, 10], [1.0, 2.0], [0.9, 1.5], [1.1, 2.5]), "smoe": Curve([0, 10], [3.0, 4.0])}
    figure = curves([Panel(kind, "changed, %", "bits per token", lines) for kind in "abcde"], "Noise", {"bz2": 1.9})
    panels = visible(figure)
    assert [axes.get_title() for axes in panels] == list("abcde")
    # Each column has its label under its lowest panel, each row at its first.
    assert [axes.get_xlabel() for axes in panels] == ["", "", "changed, %", "changed, %", "changed, %"]
    assert [axes.get_ylabel() for axes in panels] == ["bits per token", "", "", "bits per token", ""]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["vqmoe", "smoe"]
    assert panels[0].lines[0].get_ydata().tolist() == [1.0, 2.0]
    (band,) = panels[0].collections
    assert set(band.get_paths()[0].vertices[:, 1]) == {0.9, 1.5, 1.1, 2.5}
    assert panels[0].lines[2].get_ydata() == [1.9, 1.9]


def test_panels_of_other_measures_have_labels_and_scales_of_their_own():
    figure = curves(
        [Panel("", "step", name, {"smoe": Curve([1, 2], [value, value])}) for name, value in (("a", 1), ("b", 99))], ""
    )
    first, second = visible(figure)
    assert [first.get_ylabel(), second.get_ylabel()] == ["a", "b"]
    assert first.get_ylim()[1] < 2 < second.get_ylim()[0]


def test_points_have_their_bars_and_a_hollow_one_is_joined_to_the_full():
    shown = {"vqmoe": [Point(1.6, 2.0, 1.5, 2.25, hollow=True), Point(1.2, 3.0)], "smoe": [Point(1.5, 1.0)]}
    figure = points([Panel("", "MFLOPs", "bits", shown)], "Compute")
    (axes,) = visible(figure)
    joined, hollow, full = axes.lines[0], *(line for line in axes.lines if line.get_marker() == "o" and len(line.get_xdata()))
    assert joined.get_xdata().tolist() == [1.6, 1.2]
    assert (hollow.get_markerfacecolor(), full.get_markerfacecolor()) == ("white", styles(["vqmoe"])["vqmoe"]["color"])
    assert np.allclose(axes.collections[0].get_segments()[0], [[1.6, 1.5], [1.6, 2.25]])
    legend = {text.get_text() for text in figure.legends[0].get_texts()}
    assert legend == {"vqmoe", "smoe", "mode of inference", "mode of pre-training"}


def test_points_of_the_same_place_are_drawn_apart():
    shown = {"vqmoe": [Point(1.5, 2.0)], "smoe": [Point(1.5, 2.0)]}
    figure = points([Panel("", "MFLOPs", "bits", shown)], "Compute", apart=4)
    (axes,) = visible(figure)
    figure.canvas.draw()
    first, second = (line.get_transform().transform(line.get_xydata()[0]) for line in axes.lines if line.get_marker() in "oD")
    assert np.allclose(second - first, [4 * figure.dpi / 72, 0])
    assert axes.get_ylim()[0] < 2 < axes.get_ylim()[1]


def test_an_axis_begins_where_it_is_told_or_below():
    values = {"a": [3, 5], "b": [-1, 5], "c": [0, 0]}
    figure = curves([Panel(name, "step", name, {"smoe": Curve([1, 2], y)}, bottom=0) for name, y in values.items()], "")
    first, second, third = visible(figure)
    assert first.get_ylim()[0] == 0 and first.get_ylim()[1] > 5
    assert second.get_ylim()[0] < -1
    assert third.get_ylim() == (0, 1)


def test_ticks_are_places_that_were_measured_and_not_many():
    (axes,) = visible(curves([Panel("", "step", "a", {"smoe": Curve(range(100, 2001, 100), [1] * 20)})], ""))
    assert [text.get_text() for text in axes.get_xticklabels()] == ["100", "400", "700", "1000", "1300", "1600", "1900"]


def test_a_heat_map_has_a_number_in_every_cell_that_has_one(tmp_path):
    values = np.array([[0.25, math.nan], [-0.001, 0.5]])
    maps = [
        [Map("noise", ("a", "b"), ("swap", "raw"), values, "bits", 2), Map("shift", ("a", "b"), (), np.zeros((2, 0)), "bits", 2)],
        [Map("era", ("a",), ("swap",), np.array([[25.0]]), "points", 1), Map("more", ("a",), ("x",), np.array([[0.0]]), "", 1)],
    ]
    figure = heat_maps(maps, "Lost")
    first, second, third = visible(figure)
    assert [text.get_text() for text in first.texts] == ["0.25", "0.00", "0.50"]
    assert [text.get_text() for text in second.texts] == ["25.0"]
    # Dark on bright cells, bright on dark ones.
    assert [text.get_color() for text in first.texts] == ["black", "white", "black"]
    assert [axes.get_ylabel() for axes in figure.axes if axes.get_label() == "<colorbar>"] == ["bits", "points", ""]
    # No loss at all: not a scale finer than the numbers.
    assert third.images[0].get_clim() == (0, 0.01)
    save(figure, tmp_path / "figure.png", 60)


def test_savings_are_bars_and_the_time_has_its_interval():
    (axes,) = visible(saving_bars([Bars("vqmoe", ["both", "smoe"], [25, 20], (31, 29, 34))], "Saved", 28))
    assert [bar.get_width() for bar in axes.patches] == [25, 20, 31]
    (interval,) = axes.collections
    assert interval.get_segments()[0][:, 0].tolist() == [29, 34]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["both", "smoe"]
    (axes,) = visible(saving_bars([Bars("vqmoe", ["both"], [25], None)], "Saved", 28))
    assert [bar.get_width() for bar in axes.patches] == [25]


def test_a_share_map_says_its_shares_and_a_dollar_is_a_dollar(tmp_path):
    figure = share_maps(
        {"a $x$ and $": np.array([[0.25, 0.75]]), "b": np.array([[1, 0]]), "c": np.array([[0.5, 0.5]])}, "expert", "Load"
    )
    panels = [axes for axes in figure.axes if axes.images and axes.get_visible()]
    (bar,) = (axes for axes in figure.axes if axes.get_label() == "<colorbar>")
    assert [50, 50] in [list(line.get_ydata()) for line in bar.lines]
    assert [[text.get_text() for text in axes.texts] for axes in panels] == [["25", "75"], ["100", "0"], ["50", "50"]]
    save(figure, tmp_path / "figure.png", 60)
    assert (tmp_path / "figure.png").stat().st_size > 1000


def test_a_confusion_map_shows_shares_of_the_true_label(tmp_path):
    matrices = {"vqmoe": np.array([[3, 1], [0, 0]]), "smoe": np.array([[4, 0], [2, 6]])}
    figure = confusion_maps(matrices, ("no", "yes"), "Classifier")
    first, second = figure.axes[:2]
    assert [axes.get_title() for axes in (first, second)] == ["vqmoe", "smoe"]
    # No passage has the label yes: a row of zeros, no division by them.
    assert first.images[0].get_array().tolist() == [[75, 25], [0, 0]]
    assert second.images[0].get_array().tolist() == [[100, 0], [25, 75]]
    assert [text.get_text() for text in first.texts] == ["75", "25", "0", "0"]
    assert [text.get_text() for text in first.get_yticklabels()] == ["no", "yes"]
    save(figure, tmp_path / "figure.png", 60)


def test_nine_confusion_maps_are_three_in_a_row():
    figure = confusion_maps({str(i): np.eye(2) for i in range(9)}, ("no", "yes"), "Classifier")
    assert figure.axes[0].get_gridspec().get_geometry() == (3, 3)


def test_many_classes_are_named_but_not_numbered():
    labels = [f"an_intent_with_a_long_name_{i}" for i in range(77)]
    figure = confusion_maps({name: np.eye(77) for name in ("a", "b", "c")}, labels, "Classifier")
    panels = [axes for axes in figure.axes if axes.images and axes.get_visible()]
    assert [len(axes.get_xticklabels()) for axes in panels] == [77] * 3
    assert not any(axes.texts for axes in panels)
    assert figure.get_size_inches()[0] < 32
