"""E feed-forward experts of one shape, run as two grouped matrix products, and the one feed-forward of a dense model.

Shapes: A rows (assignments of tokens to experts), E experts, D width, H hidden width.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Experts(nn.Module):
    """FFN_e(x) = W2_e act(W1_e x + b1_e) + b2_e for e in 0..E-1."""

    def __init__(
        self, experts: int, width: int, hidden: int, dropout: float = 0.0, activation: Callable[[Tensor], Tensor] = F.gelu
    ) -> None:
        super().__init__()
        self.count, self.dropout, self.activation = experts, dropout, activation
        self.w1_EDH = nn.Parameter(_uniform(experts, width, hidden, fan_in=width))
        self.b1_EH = nn.Parameter(torch.zeros(experts, hidden))
        self.w2_EHD = nn.Parameter(_uniform(experts, hidden, width, fan_in=hidden))
        self.b2_ED = nn.Parameter(torch.zeros(experts, width))

    def forward(self, x_AD: Tensor, rows_E: Tensor, drop: bool = True) -> Tensor:
        """Rows sorted by expert, with the number of rows of each expert; returns (A, D) in the same order."""
        ends_E = rows_E.cumsum(0).to(torch.int32)
        # A bias repeated by row counts: its backward is a segment sum, far cheaper on a CPU than that of a gather.
        h_AH = F.grouped_mm(x_AD, self.w1_EDH, offs=ends_E) + self.b1_EH.repeat_interleave(rows_E, 0)
        h_AH = F.dropout(self.activation(h_AH), self.dropout, self.training and drop)
        return F.grouped_mm(h_AH, self.w2_EHD, offs=ends_E) + self.b2_ED.repeat_interleave(rows_E, 0)


class FeedForward(nn.Module):
    """FFN(x) = W2 gelu(W1 x + b1) + b2: one expert for all tokens, in two plain matrix products."""

    count = 1

    def __init__(self, width: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.w1 = nn.Linear(width, hidden)
        self.w2 = nn.Linear(hidden, width)

    def forward(self, x_ND: Tensor) -> Tensor:
        return self.w2(F.dropout(F.gelu(self.w1(x_ND)), self.dropout, self.training))


def _uniform(*shape: int, fan_in: int) -> Tensor:
    bound = 1 / math.sqrt(fan_in)
    return torch.empty(*shape).uniform_(-bound, bound)
