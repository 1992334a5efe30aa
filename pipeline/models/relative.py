"""Attention with relative positions and memory, as in Transformer-XL (Dai et al. 2019, section 3.3).

Shapes: B sequences, T queries, S keys (those of the memory, then those of the queries), Z = S + 1 distances, D width,
H heads, F head width.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Relative(NamedTuple):
    """What all layers share in one pass: encodings of the distances S to 0, which keys lie ahead of a query, both biases."""

    encoding_ZD: Tensor
    ahead_TS: Tensor
    content_HF: Tensor
    position_HF: Tensor


class RelativePositions(nn.Module):
    """Sinusoidal encodings of distances, and the two biases (u and v in the paper): for what a key holds and for where it is."""

    def __init__(self, width: int, heads: int, head_width: int, dropout: float) -> None:
        super().__init__()
        self.content_HF = nn.Parameter(torch.empty(heads, head_width).normal_(std=0.02))
        self.position_HF = nn.Parameter(torch.empty(heads, head_width).normal_(std=0.02))
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("frequency", 10000.0 ** (-torch.arange(0, width, 2) / width), persistent=False)

    def forward(self, queries: int, keys: int) -> Relative:
        """For the last `queries` of `keys` positions. The farthest distance, S, occurs nowhere: `_shift` wants its column."""
        distance_Z = torch.arange(keys, -1, -1, device=self.frequency.device)
        angle = distance_Z[:, None] * self.frequency
        encoding_ZD = self.dropout(torch.cat([angle.sin(), angle.cos()], 1))
        ahead_TS = torch.ones(queries, keys, dtype=torch.bool, device=distance_Z.device).triu(keys - queries + 1)
        return Relative(encoding_ZD, ahead_TS, self.content_HF, self.position_HF)


class RelativeAttention(nn.Module):
    """Causal attention; query i and key j score (q_i + u) k_j + (q_i + v) r_(i - j), with r learned from the encodings."""

    def __init__(self, width: int, heads: int, head_width: int) -> None:
        super().__init__()
        self.heads, self.scale = heads, head_width**-0.5
        inner = heads * head_width
        self.query = nn.Linear(width, inner, bias=False)
        self.key_value = nn.Linear(width, 2 * inner, bias=False)
        self.distance = nn.Linear(width, inner, bias=False)
        self.project = nn.Linear(inner, width, bias=False)

    def forward(self, seen_BSD: Tensor, relative: Relative) -> Tensor:
        """Results (B, T, D) for the last T of the S states."""
        queries = len(relative.ahead_TS)
        q_BTHF = self.query(seen_BSD[:, -queries:]).unflatten(-1, (self.heads, -1))
        k_BSHF, v_BSHF = self.key_value(seen_BSD).unflatten(-1, (2, self.heads, -1)).unbind(2)
        r_ZHF = self.distance(relative.encoding_ZD).unflatten(-1, (self.heads, -1))
        by_position_BHTZ = torch.einsum("bthf,zhf->bhtz", (q_BTHF + relative.position_HF) * self.scale, r_ZHF)
        bias_BHTS = _shift(by_position_BHTZ).masked_fill(relative.ahead_TS, -torch.inf)
        y_BHTF = F.scaled_dot_product_attention(
            (q_BTHF + relative.content_HF).transpose(1, 2),
            k_BSHF.transpose(1, 2),
            v_BSHF.transpose(1, 2),
            attn_mask=bias_BHTS,
            scale=self.scale,
        )
        return self.project(y_BHTF.transpose(1, 2).flatten(2))


def _shift(scores_BHTZ: Tensor) -> Tensor:
    """From scores by distance (S to 0) to scores (B, H, T, S) by key, without a copy.

    Query i is at position S - T + i, so its score for key j stands in column T - i + j of its row. Reading all rows as
    one, T places in, row after row of S instead of Z, that is where j falls. Keys ahead of the query get what is no score.
    """
    queries, distances = scores_BHTZ.shape[2:]
    return scores_BHTZ.flatten(2)[..., queries:].unflatten(-1, (queries, distances - 1))
