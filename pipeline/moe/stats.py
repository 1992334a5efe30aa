"""Measures of routing as pure functions (METHOD section 5).

Shapes: N tokens, D width, K assignments per token, E experts, C codes. An assignment of -1, to no expert, counts nowhere.
"""

import math
from itertools import combinations

import torch
from torch import Tensor
from torch.nn.functional import normalize


def counts(index_NK: Tensor, experts: int) -> Tensor:
    """Number of assignments per expert (E,)."""
    return torch.bincount(index_NK.flatten() + 1, minlength=experts + 1)[1:]


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
    """Share of a token's assignments that are among those of the aligned token, order ignored, over all assignments.

    At least one token must have an expert.
    """
    there_NK = index_NK >= 0
    same_NK = (index_NK[:, :, None] == other_NK[:, None, :]).any(2) & there_NK
    return float(same_NK.sum() / there_NK.sum().double())


def kappa(index_NK: Tensor, other_NK: Tensor, experts: int) -> float | None:
    """Consistency corrected for chance (Cohen 1960): (c - e) / (1 - e), 1 if nothing changed and 0 if it might be by chance.

    e is the consistency of assignments that are independent but have these loads; it grows with K and with imbalance. None where
    it is 1: then nothing is chosen.
    """
    share_E, other_E = (shares(counts(index, experts)) for index in (index_NK, other_NK))
    chance = float((other_NK >= 0).sum()) / len(other_NK) * float((share_E * other_E).sum())
    return None if chance > 1 - 1e-9 else (consistency(index_NK, other_NK) - chance) / (1 - chance)


def fluctuation(before_NK: Tensor, after_NK: Tensor) -> float:
    """Share of the assignments of fixed texts that changed between two checkpoints (Dai et al. 2022)."""
    return 1 - consistency(before_NK, after_NK)


def margins(scores_NE: Tensor) -> Tensor | None:
    """Gap (N,) between a token's best and second score, of experts or codes, in standard deviations of its scores.

    So the unit of a method's scores does not matter. 0 where all are the same; None for fewer than three scores a token,
    since two are always 2 deviations apart.
    """
    if scores_NE.shape[1] < 3:
        return None
    scores_NE = scores_NE.double()
    best_N2 = scores_NE.topk(2).values
    deviation_N = scores_NE.std(1, correction=0).clamp(min=torch.finfo(torch.double).tiny)
    return (best_N2[:, 0] - best_N2[:, 1]) / deviation_N


def margin(scores_NE: Tensor) -> float | None:
    """The mean of `margins` over tokens."""
    margin_N = margins(scores_NE)
    return None if margin_N is None else float(margin_N.mean())


def output_cosine(y_END: Tensor) -> float:
    """Cosine of two experts' outputs for the same token, mean over tokens and pairs of experts (two or more).

    That of an output of length 0 is 0.
    """
    y_END = normalize(y_END.double(), dim=-1)
    experts, tokens, _ = y_END.shape
    # The squared length of the sum of all has each pair twice, and each expert with itself.
    pairs = y_END.sum(0).square().sum() - y_END.square().sum()
    return float(pairs / (tokens * experts * (experts - 1)))


def cka(y_END: Tensor) -> float:
    """Linear CKA of two experts' outputs for the same tokens, mean over pairs of experts (two or more).

    ||Y'Z||^2 / (||Y'Y|| ||Z'Z||) with columns centred over tokens (Kornblith et al. 2019): between 0 and 1, the same however
    outputs are rotated, shifted or scaled. An output that is the same for all tokens is like no other: 0.
    """
    y_END = y_END.double()
    # Less the first token's first, so that a constant output is 0 exactly and not the rounding error of its mean.
    y_END = y_END - y_END[:, :1]
    y_END = y_END - y_END.mean(1, keepdim=True)
    own_E = torch.stack([_overlap(y_ND, y_ND).sqrt() for y_ND in y_END]).clamp(min=torch.finfo(torch.double).tiny)
    pairs = combinations(zip(y_END, own_E, strict=True), 2)
    return float(torch.stack([_overlap(y_ND, z_ND) / own_y / own_z for (y_ND, own_y), (z_ND, own_z) in pairs]).mean())


def effective_rank(x_ND: Tensor) -> float:
    """exp of the entropy of the singular values, as shares, of the states less their mean (Roy and Vetterli 2007).

    Between 1, also for states that are all the same, and the lower of N - 1 and D.
    """
    x_ND = x_ND.double()
    value_R = torch.linalg.svdvals(x_ND - x_ND.mean(0))
    return math.exp(_entropy(value_R / value_R.sum().clamp(min=torch.finfo(torch.double).tiny)))


def effective_rank_by_expert(x_ND: Tensor, index_NK: Tensor, experts: int) -> float | None:
    """Effective rank of the states that went to an expert, mean over experts weighted by their number of tokens.

    Experts with fewer than two tokens are left out; None if that leaves none.
    """
    groups = [x_ND[(index_NK == expert).any(1)] for expert in range(experts)]
    groups = [group_MD for group_MD in groups if len(group_MD) > 1]
    if not groups:
        return None
    return sum(len(group_MD) * effective_rank(group_MD) for group_MD in groups) / sum(map(len, groups))


def _overlap(y_ND: Tensor, z_ND: Tensor) -> Tensor:
    """||Y'Z||^2."""
    return (y_ND.T @ z_ND).square().sum()


def _entropy(share: Tensor) -> float:
    return float(torch.special.entr(share).sum())
