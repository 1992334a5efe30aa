"""Scores of a model on held-out data, without gradients.

Shapes: S segments, B batch, T positions, P passages, L labels.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.data.batches import padded
from pipeline.models.heads import Classifier
from pipeline.models.transformer import Hidden, Transformer
from pipeline.moe import stats
from pipeline.moe.layer import Mode

BATCH = 32

Watch = Callable[[Hidden], None]


def nats(model: Transformer, tokens_BT: Tensor, targets_BT: Tensor, mode: Mode) -> tuple[Tensor, Hidden]:
    """Mean cross-entropy in nats over targets that are not negative, and the hidden states it came from."""
    hidden = model(tokens_BT, mode)
    return F.cross_entropy(model.logits(hidden.state_BTD).flatten(0, 1), targets_BT.flatten(), ignore_index=-1), hidden


@torch.no_grad()
def bits_per_character(model: Transformer, segments: np.ndarray, mode: Mode, watch: Watch | None = None) -> float:
    """Mean bits per token of segments (S, T + 1); with byte or character tokens that is bits per character."""
    total = 0.0
    for start in range(0, len(segments), BATCH):
        batch = torch.from_numpy(segments[start : start + BATCH].astype(np.int64))
        loss, hidden = nats(model, batch[:, :-1], batch[:, 1:], mode)
        total += loss.item() * len(batch)
        if watch is not None:
            watch(hidden)
    return total / len(segments) / math.log(2)


@torch.no_grad()
def classify(model: Classifier, ids: Sequence[np.ndarray], pad: int, mode: Mode, watch: Watch | None = None) -> Tensor:
    """Scores (P, L) of passages given as token ids."""
    scores = []
    for start in range(0, len(ids), BATCH):
        tokens_BT, lengths_B = padded(ids[start : start + BATCH], pad)
        batch, hidden = model(tokens_BT, lengths_B, mode)
        scores.append(batch)
        if watch is not None:
            watch(hidden)
    return torch.cat(scores)


class RoutingTally:
    """Counts, per layer, where tokens went: call it with each batch's hidden states."""

    def __init__(self, model: Transformer) -> None:
        quantizer = getattr(model.moe_layers[0], "quantizer", None)
        codes = quantizer.codes if quantizer is not None else 0
        self._expert = [torch.zeros(layer.experts.count, dtype=torch.long) for layer in model.moe_layers]
        self._code = [torch.zeros(codes, dtype=torch.long) for _ in model.moe_layers]
        self._error: list[float] = []

    def __call__(self, hidden: Hidden) -> None:
        for layer, output in enumerate(hidden.layers):
            self._expert[layer] += torch.bincount(output.index_NK.flatten(), minlength=len(self._expert[layer]))
            if output.code_N is not None:
                self._code[layer] += torch.bincount(output.code_N, minlength=len(self._code[layer]))
                self._error.append(output.code_error.item())

    def expert_shares(self) -> list[Tensor]:
        """Share of the assignments per expert (E,), one tensor per layer."""
        return [stats.shares(count) for count in self._expert]

    def code_shares(self) -> list[Tensor]:
        """Share of the tokens per code (C,), one tensor per layer; empty without a codebook."""
        return [stats.shares(count) for count in self._code if len(count)]

    def summary(self) -> dict[str, float]:
        """Load and codebook measures, mean over layers; `code_error` is ||x - v||^2 per element, mean over batches."""
        rows = [stats.load(share) for share in self.expert_shares()]
        result = {f"load_{name}": float(np.mean([row[name] for row in rows])) for name in rows[0]}
        if codes := [stats.codebook_use(share) for share in self.code_shares()]:
            result |= {f"code_{name}": float(np.mean([row[name] for row in codes])) for name in codes[0]}
            result["code_error"] = float(np.mean(self._error))
        return result
