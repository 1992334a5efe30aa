"""E feed-forward experts of one shape, and the one feed-forward of a dense model.

Shapes: E experts, R rows of each, N tokens, D width, H hidden width.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Activation = Literal["gelu", "relu"]


class Experts(nn.Module):
    """FFN_e(x) = W2_e act(W1_e x + b1_e) + b2_e for e in 0..E-1. `dispatch.apply_experts` sends tokens to some of them."""

    def __init__(self, experts: int, width: int, hidden: int, dropout: float = 0.0, activation: Activation = "gelu") -> None:
        super().__init__()
        self.count, self.dropout, self.activation = experts, dropout, activation
        self.w1_EDH = nn.Parameter(_uniform(experts, width, hidden, fan_in=width))
        self.b1_EH = nn.Parameter(torch.zeros(experts, hidden))
        self.w2_EHD = nn.Parameter(_uniform(experts, hidden, width, fan_in=hidden))
        self.b2_ED = nn.Parameter(torch.zeros(experts, width))

    def forward(self, x_ERD: Tensor) -> Tensor:
        """The answers (E, R, D) of all experts, each to as many rows."""
        h_ERH = getattr(F, self.activation)(torch.baddbmm(self.b1_EH[:, None], x_ERD, self.w1_EDH))
        return torch.baddbmm(self.b2_ED[:, None], F.dropout(h_ERH, self.dropout, self.training), self.w2_EHD)


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
