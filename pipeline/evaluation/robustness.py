"""Scores and routing of a model on noisy text, aligned character by character with the clean text (METHOD section 5).

Shapes: S sequences (segments or passages), T positions, K assignments per token, C classes.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.data.corruption import Alphabet, corrupt, rng_for
from pipeline.errors import Failure
from pipeline.evaluation.statistics import expected_calibration_error
from pipeline.models.heads import Classifier
from pipeline.models.transformer import Hidden, Transformer
from pipeline.moe import stats
from pipeline.moe.layer import Mode

BATCH = 32

Watch = Callable[[Hidden], None]


class Noise(NamedTuple):
    """One corruption at one severity; `seed` and the sequence's index decide the draws, never the model.

    Noise works on `symbols[id]` where a tokenizer has symbols (rising with the id), else on the ids themselves.
    """

    kind: str
    rate: float
    seed: int
    alphabet: Alphabet
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

    def some(self, rows: np.ndarray) -> "Trace":
        """Of some of the texts."""
        return Trace(self.scores[rows], [index_STK[rows] for index_STK in self.index])


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
def language_trace(model: Transformer, given: Texts, segments: np.ndarray, mode: Mode, watch: Watch | None = None) -> Trace:
    """Nats (S, T) of each symbol's true successor in the clean segments (S, T + 1), given the (noisy) past; NaN elsewhere.

    Each noisy symbol is scored on the symbol that follows its own clean position. So an inserted symbol is not scored, and
    neither is the successor of a deleted one, which nothing is left to predict. Nor are two swapped symbols: what follows the
    second in the clean text is the first, which has been read, and what follows the first is not what comes next.
    """
    clean_ST1 = torch.from_numpy(segments.astype(np.int64))
    source_ST = given.source_ST
    followed_ST = F.pad(source_ST[:, 1:], (0, 1), value=-1)
    swapped_ST = (source_ST < source_ST.cummax(1).values) | ((followed_ST >= 0) & (followed_ST < source_ST))
    target_ST = clean_ST1.gather(1, source_ST.clamp(min=0) + 1).masked_fill((source_ST < 0) | swapped_ST, -1)
    scores, index = [], []
    for rows in torch.arange(len(segments)).split(BATCH):
        hidden = model(given.tokens_ST[rows], mode)
        if watch is not None:
            watch(hidden)
        nats = model.nats(hidden.state_BTD, target_ST[rows]).cpu()
        scores.append(nats.masked_fill(target_ST[rows] < 0, math.nan))
        index.append(_experts(hidden, torch.ones_like(given.tokens_ST[rows], dtype=torch.bool)))
    return Trace(torch.cat(scores), [torch.cat(parts) for parts in zip(*index, strict=True)])


@torch.no_grad()
def classifier_trace(model: Classifier, given: Texts, mode: Mode, watch: Watch | None = None) -> Trace:
    """Class scores (S, C) of passages."""
    scores, index = [], []
    for rows in torch.arange(len(given.lengths_S)).split(BATCH):
        tokens_BT, lengths_B = given.tokens_ST[rows], given.lengths_S[rows]
        batch, hidden = model(tokens_BT, lengths_B, mode)
        if watch is not None:
            watch(hidden)
        scores.append(batch.float().cpu())
        index.append(_experts(hidden, torch.arange(tokens_BT.shape[1]) < lengths_B[:, None]))
    return Trace(torch.cat(scores), [torch.cat(parts) for parts in zip(*index, strict=True)])


class Effect(NamedTuple):
    """What a condition did, text by text, float64: the score (S,), and what it cost (S,), positive where it hurts.

    Where noisy positions have clean ones, also the share of assignments that stayed, per layer, and the same corrected for
    chance. Of a classifier the expected calibration error and the share of predictions that changed. Of other images `clean_S`,
    the scores of the clean ones that they are compared with.
    """

    score_S: np.ndarray
    lost_S: np.ndarray
    consistency: list[float] | None = None
    kappa: list[float | None] | None = None
    ece: float | None = None
    flips: float | None = None
    clean_S: np.ndarray | None = None


def language_effect(clean: Trace, noisy: Trace, source_ST: Tensor, experts: int) -> Effect:
    """Bits per token of each segment, and how many more than at the clean positions of the same symbols."""
    before_ST = clean.scores.gather(1, source_ST.clamp(min=0))
    score_S, lost_S = (_mean_bits(nats_ST) for nats_ST in (noisy.scores, noisy.scores - before_ST))
    return Effect(score_S, lost_S, *_steadiness(clean, noisy, source_ST, experts))


def shift_effect(clean: Trace, shifted: Trace) -> Effect:
    """Bits per token of segments of another text, and how many more than the mean of the clean ones."""
    score_S = _mean_bits(shifted.scores)
    return Effect(score_S, score_S - _mean_bits(clean.scores).mean())


def classifier_effect(clean: Trace, noisy: Trace, labels_S: Tensor, source_ST: Tensor, experts: int) -> Effect:
    """1 for a right label and 0 for a wrong one, and the difference to what the clean passage got."""
    for trace in (clean, noisy):
        if not trace.scores.isfinite().all():
            raise _not_finite("a class score")
    right_S, before_S = ((trace.scores.argmax(1) == labels_S).double().numpy() for trace in (noisy, clean))
    confidence_S = noisy.scores.double().softmax(1).amax(1).numpy()
    return Effect(
        right_S,
        before_S - right_S,
        *_steadiness(clean, noisy, source_ST, experts),
        expected_calibration_error(confidence_S, right_S),
        (noisy.scores.argmax(1) != clean.scores.argmax(1)).double().mean().item(),
    )


def _steadiness(
    clean: Trace, noisy: Trace, source_ST: Tensor, experts: int
) -> tuple[list[float] | None, list[float | None] | None]:
    """Per layer the share of assignments that noise leaves as they were, over symbols that survive it, and its kappa.

    Nothing where `experts` is 1 (or 0, for texts that are not aligned).
    """
    if experts < 2:
        return None, None
    row, column = torch.nonzero(source_ST >= 0, as_tuple=True)
    origin = source_ST[row, column]
    pairs = [(before[row, origin], after[row, column]) for before, after in zip(clean.index, noisy.index, strict=True)]
    return [stats.consistency(*pair) for pair in pairs], [stats.kappa(*pair, experts) for pair in pairs]


def _mean_bits(nats_ST: Tensor) -> np.ndarray:
    """Mean over the scored positions of each segment."""
    if nats_ST.isnan().all(1).any():
        raise Failure("noise leaves nothing to score of a segment; lower robustness.rates or raise model.context")
    bits_S = (nats_ST.double().nanmean(1) / math.log(2)).numpy()
    if not np.isfinite(bits_S).all():
        raise _not_finite("bits per token")
    return bits_S


def _experts(hidden: Hidden, valid_BT: Tensor) -> list[Tensor]:
    """Per layer the experts (B, T, K) of every position, -1 where no token was."""
    result = []
    for output in hidden.layers:
        index_BTK = torch.full((*valid_BT.shape, output.index_NK.shape[1]), -1)
        whole = len(output.index_NK) == valid_BT.numel()
        index_BTK[torch.ones_like(valid_BT) if whole else valid_BT] = output.index_NK.cpu()
        result.append(index_BTK)
    return result


def _not_finite(name: str) -> Failure:
    return Failure(f"{name} is not finite; train the model again with a lower learning rate")
