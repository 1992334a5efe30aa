import numpy as np

from pipeline.evaluation.plots import confusion_maps, save


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
