"""Scores of a model on held-out data, without gradients.

Shapes: S rows or segments, B batch, T positions, P passages, L labels.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.data.batches import padded, rows, segments
from pipeline.data.tokenizers import Unit
from pipeline.models.backbone import Backbone, Hidden
from pipeline.models.heads import Classifier
from pipeline.models.transformer import Transformer
from pipeline.models.vit import Vit
from pipeline.moe import stats
from pipeline.moe.layer import Mode

BATCH = 32
IMAGES = 128
ROWS = 8  # of a text that is read in order
INDEX_TYPES = (torch.int8, torch.int16, torch.int32)  # the smallest that fits holds an assignment

Watch = Callable[[Hidden], None]


def score(nats: Tensor, unit: Unit) -> Tensor:
    """Mean nats per token as bits per character (of tokens that are characters) or as perplexity."""
    return nats / math.log(2) if unit == "bpc" else nats.exp()


def nats(model: Transformer, rows_BT: Tensor, mode: Mode, memory: list[Tensor] | None = None) -> tuple[Tensor, Hidden]:
    """Mean nats of the next tokens in rows (B, T + 1), and the hidden states it came from; -1 stands where a row has ended."""
    nats_BT, hidden = _token_nats(model, rows_BT, mode, memory)
    return nats_BT.sum() / (rows_BT[:, 1:] >= 0).sum(), hidden


def held_out(model: Transformer, tokens: np.ndarray, limit: int | None = None) -> np.ndarray:
    """The text to score, or about `limit` tokens of it: long rows if the model remembers at evaluation, else segments."""
    if model.evaluate_memory:
        return rows(tokens, ROWS, limit)
    return segments(tokens, model.evaluate_context, None if limit is None else max(1, limit // model.evaluate_context))


@torch.no_grad()
def score_tokens(
    model: Transformer, rows_ST: np.ndarray, mode: Mode, unit: Unit, *, memory: int | None = None, watch: Watch | None = None
) -> float:
    """Score of all next tokens in rows (S, T + 1), in `unit`; memory as of `row_nats`."""
    total_S, count_S = row_nats(model, rows_ST, mode, memory=memory, watch=watch)
    return score(total_S.sum() / count_S.sum(), unit).item()


@torch.no_grad()
def row_nats(
    model: Transformer, rows_ST: np.ndarray, mode: Mode, *, memory: int | None = None, watch: Watch | None = None
) -> tuple[Tensor, Tensor]:
    """Sum of the nats of each row's next tokens (S,), float64, and their number (S,), of rows (S, T + 1).

    The model remembers `memory` tokens, its `evaluate_memory` where nothing is said. If it remembers any, each row is read in
    order, `evaluate_context` tokens at a time, else a row is one segment.
    """
    memory = model.evaluate_memory if memory is None else memory
    total_S, count_S = (torch.zeros(len(rows_ST), dtype=torch.float64) for _ in range(2))
    length = rows_ST.shape[1] - 1
    step = model.evaluate_context if memory else length
    for start in range(0, len(rows_ST), BATCH):
        batch_BT = torch.from_numpy(rows_ST[start : start + BATCH].astype(np.int64))
        past = None
        for first in range(0, length, step):
            segment_BT = batch_BT[:, first : first + step + 1]
            nats_BT, hidden = _token_nats(model, segment_BT, mode, past)
            past = hidden.memory(memory)
            total_S[start : start + BATCH] += nats_BT.cpu().sum(1, dtype=torch.float64)
            count_S[start : start + BATCH] += (segment_BT[:, 1:] >= 0).sum(1)
            if watch is not None:
                watch(hidden)
    return total_S, count_S


def _token_nats(model: Transformer, rows_BT: Tensor, mode: Mode, memory: list[Tensor] | None) -> tuple[Tensor, Hidden]:
    """Nats (B, T) of the next tokens in rows (B, T + 1), zero where a row has ended, and the hidden states."""
    target_BT = rows_BT[:, 1:]
    valid_BT = target_BT >= 0
    hidden = model(rows_BT[:, :-1].clamp(min=0), mode, None if valid_BT.all() else valid_BT, memory)
    return model.nats(hidden.state_BTD, target_BT), hidden


@torch.no_grad()
def classify(model: Classifier, ids: Sequence[np.ndarray], pad: int, mode: Mode, watch: Watch | None = None) -> Tensor:
    """Scores (P, L) of passages given as token ids."""
    scores = []
    for start in range(0, len(ids), BATCH):
        tokens_BT, lengths_B = padded(ids[start : start + BATCH], pad)
        batch, hidden = model(tokens_BT, lengths_B, mode)
        scores.append(batch.float().cpu())
        if watch is not None:
            watch(hidden)
    return torch.cat(scores)


@torch.no_grad()
def classify_images(model: Vit, pixels_NCHW: np.ndarray, mode: Mode, watch: Watch | None = None) -> Tensor:
    """Scores (N, L) of images given as bytes."""
    scores = []
    for start in range(0, len(pixels_NCHW), IMAGES):
        batch, hidden = model(torch.from_numpy(np.array(pixels_NCHW[start : start + IMAGES])) / 255, mode)
        scores.append(batch.float().cpu())
        if watch is not None:
            watch(hidden)
    return torch.cat(scores)


class RoutingTally:
    """Counts, per layer, where tokens went: call it with each batch's hidden states.

    With `keep` it holds every assignment too, so that two passes over the same texts or images can be compared.
    """

    def __init__(self, model: Backbone, keep: bool = False) -> None:
        quantizer = getattr(model.moe_layers[0], "quantizer", None)
        codes = quantizer.codes if quantizer is not None else 0
        self.blocks = model.expert_blocks
        self._expert = [torch.zeros(layer.experts.count, dtype=torch.long) for layer in model.moe_layers]
        self._code = [torch.zeros(codes, dtype=torch.long) for _ in model.moe_layers]
        self._error: list[float] = []
        self._tokens = 0
        self._margin: list[list[float]] = [[] for _ in model.moe_layers]  # sums over the tokens of a batch
        self._keep = keep
        self._index: list[list[Tensor]] = [[] for _ in model.moe_layers]

    def __call__(self, hidden: Hidden) -> None:
        outputs = [output.cpu() for output in hidden.layers]
        tokens = len(outputs[0].index_NK)
        self._tokens += tokens
        for layer, output in enumerate(outputs):
            experts = len(self._expert[layer])
            self._expert[layer] += stats.counts(output.index_NK, experts)
            if output.code_N is not None:
                self._code[layer] += torch.bincount(output.code_N, minlength=len(self._code[layer]))
                self._error.append(output.code_error.item())
            if output.scores is not None and (margin := stats.margin(output.scores)) is not None:
                self._margin[layer].append(margin * tokens)
            if self._keep:
                smallest = next(kind for kind in INDEX_TYPES if experts - 1 <= torch.iinfo(kind).max)
                self._index[layer].append(output.index_NK.to(smallest))

    def expert_shares(self) -> list[Tensor]:
        """Share of the assignments per expert (E,), one tensor per layer."""
        return [stats.shares(count) for count in self._expert]

    def code_shares(self) -> list[Tensor]:
        """Share of the tokens per code (C,), one tensor per layer; empty without a codebook."""
        return [stats.shares(count) for count in self._code if len(count)]

    def margins(self) -> list[float]:
        """Margin between first and second choice per layer, mean over tokens; empty where it is undefined."""
        return [sum(sums) / self._tokens for sums in self._margin if sums]

    def index(self) -> list[Tensor]:
        """The experts of every token (N, K), one tensor per layer, of a tally that kept them."""
        return [torch.cat(batches) for batches in self._index]

    def fluctuation(self, before: Sequence[Tensor]) -> list[float | None]:
        """Share of assignments that changed since those of another tally (`index`) of the same texts, per layer.

        None where nothing is chosen.
        """
        return [
            stats.fluctuation(earlier, later) if self._chosen(layer) else None
            for layer, (earlier, later) in enumerate(zip(before, self.index(), strict=True))
        ]

    def rows(self) -> list[dict[str, float]]:
        """Load, margin and codebook use of each layer, as far as they exist; no load where nothing is chosen."""
        margins, codes, result = self.margins(), self.code_shares(), []
        for layer, share in enumerate(self.expert_shares()):
            row = {"layer": self.blocks[layer]}
            if self._chosen(layer):
                row |= stats.load(share)
            if margins:
                row["margin"] = margins[layer]
            if codes:
                row |= stats.codebook_use(codes[layer])
            result.append(row)
        return result

    def summary(self) -> dict[str, float]:
        """Load, margin and codebook measures, mean over layers; `code_error` is ||x - v||^2 per element, mean over batches."""
        rows = [stats.load(share) for share in self.expert_shares()]
        result = {f"load_{name}": float(np.mean([row[name] for row in rows])) for name in rows[0]}
        if margins := self.margins():
            result["margin"] = float(np.mean(margins))
        if codes := [stats.codebook_use(share) for share in self.code_shares()]:
            result |= {f"code_{name}": float(np.mean([row[name] for row in codes])) for name in codes[0]}
            result["code_error"] = float(np.mean(self._error))
        return result

    def _chosen(self, layer: int) -> bool:
        """Whether some expert did without some token: not in a dense layer, nor where all experts are asked."""
        return bool((self._expert[layer] != self._tokens).any())


class RoutingHistory:
    """Routing of the same texts at one validation after another, and what changes from each to the next."""

    COLUMNS = tuple("step layer imbalance entropy variation unused margin fluctuation utilisation perplexity".split())

    def __init__(self) -> None:
        self._validations: list[list[dict[str, float | None]]] = []
        self._before: list[Tensor] | None = None

    def add(self, tally: RoutingTally) -> dict[str, float]:
        """Take a validation's tally, which kept its assignments; its summary, from the second on with the `fluctuation`."""
        rows, changed = tally.rows(), []
        if self._before is not None:
            changed = tally.fluctuation(self._before)
            rows = [row | {"fluctuation": share} for row, share in zip(rows, changed, strict=True)]
        self._validations.append(rows)
        self._before = tally.index()
        known = [share for share in changed if share is not None]
        return tally.summary() | ({"fluctuation": float(np.mean(known))} if known else {})

    def state_dict(self) -> dict[str, Any]:
        return {"validations": self._validations, "before": self._before}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._validations, self._before = list(state["validations"]), state["before"]

    def rows(self, steps: Sequence[int]) -> list[dict[str, float | None]]:
        """A row with all columns per validation, of which these are the steps, and layer; None where there is no value."""
        validations = zip(steps, self._validations, strict=True)
        return [dict.fromkeys(self.COLUMNS) | {"step": step} | row for step, rows in validations for row in rows]
