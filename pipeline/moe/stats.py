"""Measures of routing as pure functions (METHOD section 5).

Shapes: N tokens, K assignments per token, E experts, C codes.
"""

import math

import torch
from torch import Tensor


def shares(count: Tensor) -> Tensor:
    """Counts per expert or code as shares of all; float64, sums to 1."""
    return count.double() / count.sum().clamp(min=1)


def load(share_E: Tensor) -> dict[str, float]:
    """Imbalance (max/mean - 1), entropy / ln E, coefficient of variation and number of unused experts."""
    experts = len(share_E)
    return {
        "imbalance": float(share_E.max() * experts - 1),
        "entropy": _entropy(share_E) / math.log(experts) if experts > 1 else 1.0,
        "variation": float(share_E.std(correction=0) * experts),
        "unused": int((share_E == 0).sum()),
    }


def codebook_use(share_C: Tensor) -> dict[str, float]:
    """Utilisation (share of codes used) and perplexity exp(H), between 1 and C."""
    return {"utilisation": float((share_C > 0).double().mean()), "perplexity": math.exp(_entropy(share_C))}


def consistency(index_NK: Tensor, other_NK: Tensor) -> float:
    """Share of assignments that are the same for aligned tokens: |A and B| / K, mean over tokens, order ignored."""
    return float((index_NK[:, :, None] == other_NK[:, None, :]).any(2).double().mean())


def _entropy(share: Tensor) -> float:
    return float(torch.special.entr(share).sum())
