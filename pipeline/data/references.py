"""Scores that a model has to be compared with: compressors for a language model, TF-IDF for a classifier."""

import bz2
import lzma
import zlib
from collections.abc import Iterable

import numpy as np

from pipeline.data.corpora import view
from pipeline.data.tasks import Task
from pipeline.errors import Failure


def compressors(chunks: Iterable[bytes]) -> dict[str, float]:
    """Bits per byte that gzip, bz2 and xz reach at their strongest on bytes that come in chunks."""
    packers = {
        "gzip": zlib.compressobj(9, wbits=16 + zlib.MAX_WBITS),
        "bz2": bz2.BZ2Compressor(9),
        "xz": lzma.LZMACompressor(preset=9 | lzma.PRESET_EXTREME),
    }
    length, sizes = 0, dict.fromkeys(packers, 0)
    for chunk in chunks:
        length += len(chunk)
        for name, packer in packers.items():
            sizes[name] += len(packer.compress(chunk))
    return {name: 8 * (sizes[name] + len(packer.flush())) / length for name, packer in packers.items()}


def unigram_entropy(tokens: np.ndarray) -> float:
    """Bits per token of the tokens' own frequencies."""
    share = np.bincount(tokens) / len(tokens)
    share = share[share > 0]
    return float(-(share * np.log2(share)).sum())


def tfidf(task: Task, vocabulary: int, view_name: str) -> dict[str, float]:
    """Accuracy and macro-F1 on test of logistic regression on TF-IDF of words and word pairs, and the majority's share.

    Reads whole passages in the model's view.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import f1_score

    texts = {split: [view(example.text, view_name) for example in task.splits[split]] for split in ("train", "test")}
    labels = {split: np.array([task.labels.index(example.label) for example in task.splits[split]]) for split in texts}
    # token_pattern: single letters are words here (the default drops them, and a class may hang on them).
    vectorizer = TfidfVectorizer(
        ngram_range=(1, 2), sublinear_tf=True, max_features=vocabulary, token_pattern=r"(?u)\b\w+\b", dtype=np.float32
    )
    try:
        train = vectorizer.fit_transform(texts["train"])
    except ValueError:
        raise Failure(f"data.view {view_name} leaves no word in the task's training texts; use data.view: bytes") from None
    model = LogisticRegression(C=10.0, max_iter=200).fit(train, labels["train"])
    predicted = model.predict(vectorizer.transform(texts["test"]))
    majority = np.bincount(labels["train"]).argmax()
    return {
        "accuracy": float((predicted == labels["test"]).mean()),
        "macro_f1": float(f1_score(labels["test"], predicted, average="macro")),
        "majority": float((labels["test"] == majority).mean()),
    }
