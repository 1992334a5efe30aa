import numpy as np
import torch

from pipeline.training.problems import scored


def test_confusion_and_class_scores_equal_counts_by_hand():
    labels = ("a", "b", "c")
    true, predicted = [0, 0, 0, 1, 1, 1, 1], [0, 1, 2, 1, 1, 0, 1]
    scores_PL = torch.nn.functional.one_hot(torch.tensor(predicted), 3).double()
    test = scored(scores_PL, np.array(true), labels)
    confusion, classes = test.tables["confusion"], test.tables["classes"]
    assert test.score_U.tolist() == [float(t == p) for t, p in zip(true, predicted, strict=True)]
    assert test.metrics["accuracy"] == test.score_U.mean()
    pairs = list(zip(true, predicted, strict=True))
    assert confusion == [
        {"": label} | {other: pairs.count((i, j)) for j, other in enumerate(labels)} for i, label in enumerate(labels)
    ]
    for i, row in enumerate(classes):
        hits, told, there = pairs.count((i, i)), predicted.count(i), true.count(i)
        precision, recall = hits / told if told else 0.0, hits / there if there else 0.0
        f1 = 2 * precision * recall / (precision + recall) if hits else 0.0
        assert row == {"label": labels[i], "precision": precision, "recall": recall, "f1": f1, "examples": there}
