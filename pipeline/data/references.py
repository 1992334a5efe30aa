"""Scores that a model has to be compared with: compressors for a language model, TF-IDF for a classifier."""

import bz2
import lzma
import zlib
from collections.abc import Iterable

import numpy as np
import torch

from pipeline.data.corpora import view
from pipeline.data.images import Images, spaced_images
from pipeline.data.tasks import Task
from pipeline.data.tokenizers import Unit
from pipeline.errors import Failure

PIXEL_IMAGES, PIXEL_SIDE = 10_000, 32


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


def language_references(compressed: dict[str, float], tokens: np.ndarray, size: int, unit: Unit) -> dict[str, dict[str, float]]:
    """Bits per byte of a text of `size` bytes that compressors reach, and that the frequencies of its tokens do.

    Where models are scored by perplexity, also as such: 2 to the bits of a token's mean number of bytes.
    """
    token_bytes = size / len(tokens)
    bits = compressed | {"unigram": unigram_entropy(tokens) / token_bytes}
    if unit == "bpc":
        return {"bits_per_character": bits}
    return {"bits_per_character": bits, "perplexity": {name: 2 ** (value * token_bytes) for name, value in bits.items()}}


def pixels(train: Images, test: Images) -> dict[str, float]:
    """Accuracy and macro-F1 on test of logistic regression on pixels, and the majority's share.

    Of more than `PIXEL_IMAGES` images of a split it reads so many, evenly spaced, and large ones made smaller.
    """
    from sklearn.linear_model import LogisticRegression

    given = {"train": spaced_images(train, PIXEL_IMAGES), "test": spaced_images(test, PIXEL_IMAGES)}
    labels = {split: images.labels_N for split, images in given.items()}
    x_train, x_test = (_small(images.pixels_NCHW) for images in given.values())
    # Pixels are many and alike: with less of a penalty the fit does not converge, and is no better.
    mean = x_train.mean(0)
    model = LogisticRegression(C=0.01, max_iter=500).fit(x_train - mean, labels["train"])
    return _scores(model.predict(x_test - mean), labels)


def _small(pixels_NCHW: np.ndarray) -> np.ndarray:
    """As rows of numbers from 0 to 1, of at most `PIXEL_SIDE` pixels a side."""
    from torchvision.transforms.v2 import functional

    side = min(PIXEL_SIDE, pixels_NCHW.shape[2])
    rows = [
        functional.resize(torch.from_numpy(np.array(chunk)), [side, side], antialias=True).flatten(1)
        for chunk in np.array_split(pixels_NCHW, -(-len(pixels_NCHW) // 256))
    ]
    return torch.cat(rows).numpy() / np.float32(255)


def tfidf(task: Task, vocabulary: int, view_name: str) -> dict[str, float]:
    """Accuracy and macro-F1 on test of logistic regression on TF-IDF of words and word pairs, and the majority's share.

    Reads whole passages in the model's view.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

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
    return _scores(model.predict(vectorizer.transform(texts["test"])), labels)


def _scores(predicted: np.ndarray, labels: dict[str, np.ndarray]) -> dict[str, float]:
    from sklearn.metrics import f1_score

    majority = np.bincount(labels["train"]).argmax()
    return {
        "accuracy": float((predicted == labels["test"]).mean()),
        "macro_f1": float(f1_score(labels["test"], predicted, average="macro")),
        "majority": float((labels["test"] == majority).mean()),
    }
