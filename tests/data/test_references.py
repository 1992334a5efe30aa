import bz2
import gzip
import lzma
import math

import numpy as np
import pytest

from pipeline.data.references import compressors, tfidf, unigram_entropy
from pipeline.data.tasks import Example, Task
from pipeline.errors import Failure


def test_entropy_and_compressors():
    assert unigram_entropy(np.array([0, 1, 2, 3] * 10)) == pytest.approx(2.0)
    data = bytes(np.random.default_rng(0).integers(0, 2, 40_000, dtype=np.uint8))
    scores = compressors(data[start : start + 999] for start in range(0, len(data), 999))
    for name, bits in scores.items():
        assert 0.99 < bits < 2.1, name
    whole = [gzip.compress(data, 9), bz2.compress(data, 9), lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)]
    assert list(scores.values()) == [8 * len(packed) / len(data) for packed in whole]
    assert compressors([b"a" * 100_000])["xz"] < 0.1


def test_a_view_that_leaves_no_word_is_named():
    examples = [Example("\u6f22", "a"), Example("\u5b57", "b")]
    with pytest.raises(Failure, match=r"data\.view text27 leaves no word in the task's training texts"):
        tfidf(Task(("a", "b"), dict.fromkeys(("train", "valid", "test"), examples)), 100, "text27")


def test_tfidf_learns_what_can_be_learnt_and_repeats():
    rng = np.random.default_rng(0)
    words = {"a": ["tea", "milk", "cup"], "b": ["oil", "gas", "car"]}

    def examples(count):
        return [Example(" ".join(rng.choice([*words[label], "the", "of"], 12)), label) for label in "ab" for _ in range(count)]

    task = Task(("a", "b"), {"train": examples(40), "valid": examples(5), "test": [*examples(20), Example("tea", "b")]})
    scores = tfidf(task, 100, "text27")
    assert scores["accuracy"] == pytest.approx(40 / 41)
    assert 0.9 < scores["macro_f1"] < 1
    assert scores["majority"] in (pytest.approx(20 / 41), pytest.approx(21 / 41))
    assert tfidf(task, 100, "text27") == scores
    assert math.isfinite(scores["accuracy"])
