import numpy as np
import pytest
import torch

from pipeline.data.tokenizers import Tokenizer
from pipeline.training.problems import Language, scored


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


def test_a_short_text_read_in_order_scores_in_every_row(tiny_params, tiny_spec, seeded):
    section = tiny_params("model.positions=relative", "model.evaluate_context=5", "model.evaluate_memory=40").model
    test = np.random.default_rng(0).integers(0, 50, 50).astype(np.uint16)
    problem = Language(tiny_spec("smoe", model=section), Tokenizer.bytes(), {"test": test}, 2, 100, 0)
    found = problem.test(problem.fresh().eval(), "router")
    # Of seven rows, since eight of so few tokens would leave one without any; all predict as many.
    assert len(found.score_U) == 7
    assert found.metrics["bpc"] == pytest.approx(found.score_U.mean())
