"""Scores and routing of a model on noisy text, aligned character by character with the clean text (METHOD section 5).

Shapes: S sequences, T positions, K assignments per token, P passages.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipeline.data.corruption import corrupt, rng_for
from pipeline.errors import Failure
from pipeline.models.heads import Classifier
from pipeline.models.transformer import Hidden, Transformer
from pipeline.moe import stats
from pipeline.moe.layer import Mode

BATCH = 32


class Noise(NamedTuple):
    """One corruption at one severity; `seed` and the sequence's index decide the draws, never the model.

    Noise works on `symbols[id]` where a tokenizer has symbols (rising with the id), else on the ids themselves.
    """

    kind: str
    rate: float
    seed: int
    alphabet: np.ndarray
    symbols: np.ndarray | None = None


class Texts(NamedTuple):
    """Right-padded sequences (S, T), their lengths (S,), and the clean position of every symbol or -1 (S, T)."""

    tokens_ST: Tensor
    lengths_S: Tensor
    source_ST: Tensor


class Trace(NamedTuple):
    """What a model did with texts: its scores, and per layer the experts of every position (S, T, K)."""

    scores: Tensor
    index: list[Tensor]


def texts(ids: Sequence[np.ndarray], length: int, pad: int, noise: Noise | None = None) -> Texts:
    """Sequences of at most `length` symbols, clean or corrupted; what an insertion pushes over `length` is cut."""
    tokens = np.full((len(ids), length), pad, dtype=np.int64)
    source = np.full((len(ids), length), -1, dtype=np.int64)
    lengths = np.zeros(len(ids), dtype=np.int64)
    for row, clean in enumerate(ids):
        symbols, origin = np.asarray(clean[:length]), np.arange(min(len(clean), length))
        if noise is not None:
            rng = rng_for(noise.seed, noise.kind, noise.rate, row)
            given = symbols if noise.symbols is None else noise.symbols[symbols]
            symbols, origin = corrupt(given, noise.kind, noise.rate, noise.alphabet, rng)
            symbols = symbols if noise.symbols is None else np.searchsorted(noise.symbols, symbols)
        lengths[row] = min(len(symbols), length)
        tokens[row, : lengths[row]], source[row, : lengths[row]] = symbols[:length], origin[:length]
    return Texts(torch.from_numpy(tokens), torch.from_numpy(lengths), torch.from_numpy(source))


@torch.no_grad()
def language_trace(model: Transformer, given: Texts, segments: np.ndarray, mode: Mode) -> Trace:
    """Nats (S, T) of each symbol's true successor in the clean segments (S, T + 1), given the (noisy) past; NaN elsewhere.

    Each noisy symbol is scored on the symbol that follows its own clean position. So an inserted symbol is not scored, and
    neither is the successor of a deleted one, which nothing is left to predict; of swapped symbols each keeps its successor.
    """
    clean_ST1 = torch.from_numpy(segments.astype(np.int64))
    target_ST = clean_ST1.gather(1, given.source_ST.clamp(min=0) + 1).masked_fill(given.source_ST < 0, -1)
    scores, index = [], []
    for rows in torch.arange(len(segments)).split(BATCH):
        hidden = model(given.tokens_ST[rows], mode)
        nats = model.nats(hidden.state_BTD, target_ST[rows])
        scores.append(nats.masked_fill(target_ST[rows] < 0, math.nan))
        index.append(_experts(hidden, torch.ones_like(given.tokens_ST[rows], dtype=torch.bool)))
    return Trace(torch.cat(scores), [torch.cat(parts) for parts in zip(*index, strict=True)])


@torch.no_grad()
def classifier_trace(model: Classifier, given: Texts, mode: Mode) -> Trace:
    """Label scores (P, L) of passages."""
    scores, index = [], []
    for rows in torch.arange(len(given.lengths_S)).split(BATCH):
        tokens_BT, lengths_B = given.tokens_ST[rows], given.lengths_S[rows]
        batch, hidden = model(tokens_BT, lengths_B, mode)
        scores.append(batch)
        index.append(_experts(hidden, torch.arange(tokens_BT.shape[1]) < lengths_B[:, None]))
    return Trace(torch.cat(scores), [torch.cat(parts) for parts in zip(*index, strict=True)])


def bits(trace: Trace) -> float:
    """Mean bits per token over scored positions."""
    return _finite(trace.scores.nanmean().item() / math.log(2), "bits per token")


def bits_degradation(clean: Trace, noisy: Trace, source_ST: Tensor) -> float:
    """Bits per token lost, over the positions both runs score: each noisy one against its own clean position."""
    before = clean.scores.gather(1, source_ST.clamp(min=0))
    return _finite((noisy.scores - before).nanmean().item() / math.log(2), "degradation")


def accuracy(trace: Trace, labels_P: Tensor) -> float:
    return _finite((trace.scores.argmax(1) == labels_P).double().mean().item(), "accuracy")


def consistency(clean: Trace, noisy: Trace, source_ST: Tensor) -> float:
    """Share of assignments that noise leaves as they were, over characters that survive it, mean over layers."""
    row, column = torch.nonzero(source_ST >= 0, as_tuple=True)
    origin = source_ST[row, column]
    return float(
        np.mean(
            [
                stats.consistency(before[row, origin], after[row, column])
                for before, after in zip(clean.index, noisy.index, strict=True)
            ]
        )
    )


def _experts(hidden: Hidden, valid_BT: Tensor) -> list[Tensor]:
    """Per layer the experts (B, T, K) of every position, -1 where no token was."""
    result = []
    for output in hidden.layers:
        index_BTK = torch.full((*valid_BT.shape, output.index_NK.shape[1]), -1)
        whole = len(output.index_NK) == valid_BT.numel()
        index_BTK[torch.ones_like(valid_BT) if whole else valid_BT] = output.index_NK
        result.append(index_BTK)
    return result


def _finite(value: float, name: str) -> float:
    if not math.isfinite(value):
        raise Failure(f"{name} is {value}: the model's scores are not finite; train it again with a lower learning rate")
    return value
