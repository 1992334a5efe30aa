import numpy as np

from pipeline.evaluation.plots import confusion_maps, save, severity_curves, share_maps, styles
from pipeline.moe.layer import SETTINGS


def test_no_two_methods_look_alike():
    looks = styles(list(SETTINGS)).values()
    assert len({look["color"] for look in looks}) == len({look["marker"] for look in looks}) == len(SETTINGS)


def test_a_panel_per_corruption_and_one_legend_for_all():
    points = [[{"rate": 0.0, "score": 1.0}, {"rate": 0.1, "score": 2.0}]]
    figure = severity_curves({kind: {"vqmoe": points, "smoe": points} for kind in "abcd"}, "tokens", "bits per token", "Noise")
    panels = [axes for axes in figure.axes if axes.get_visible()]
    assert [axes.get_title() for axes in panels] == list("abcd")
    # Each column has its label under its lowest panel.
    assert [axes.get_xlabel() for axes in panels] == ["", "tokens changed, %", "tokens changed, %", "tokens changed, %"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["vqmoe", "smoe"]
    assert panels[0].lines[0].get_xdata().tolist() == [0, 10]


def test_a_share_map_says_its_shares_and_a_dollar_is_a_dollar(tmp_path):
    figure = share_maps({"a $x$ and $": np.array([[0.25, 0.75]]), "b": np.array([[1, 0]]), "c": np.array([[0.5, 0.5]])}, "expert")
    panels = [axes for axes in figure.axes if axes.images and axes.get_visible()]
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


def test_many_classes_are_named_but_not_numbered():
    labels = [f"an_intent_with_a_long_name_{i}" for i in range(77)]
    figure = confusion_maps({name: np.eye(77) for name in ("a", "b", "c")}, labels, "Classifier")
    panels = [axes for axes in figure.axes if axes.images and axes.get_visible()]
    assert [len(axes.get_xticklabels()) for axes in panels] == [77] * 3
    assert not any(axes.texts for axes in panels)
    assert figure.get_size_inches()[0] < 32
