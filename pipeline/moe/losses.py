"""Auxiliary losses as pure functions.

Where processes share a step, loads are those of all of their tokens.

Shapes: N tokens, E experts, K experts per token, D width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline import ranks


def balance_loss(*, probs_NE: Tensor, index_NK: Tensor) -> Tensor:
    """E * sum_e f_e P_e: exactly 1 when both are uniform, up to E when one expert takes all (Switch Transformers).

    f_e is the share of assignments to expert e (no gradient), P_e the mean probability of e.
    """
    experts = probs_NE.shape[1]
    count_E = ranks.total(torch.bincount(index_NK.flatten(), minlength=experts))
    share_E = count_E.to(probs_NE.dtype) / count_E.sum()
    return experts * (share_E * probs_NE.mean(0)).sum()


def overload_loss(*, weight_NK: Tensor, index_NK: Tensor, experts: int) -> Tensor:
    """Mean over assignments of (n_e / n - 1) w, with n_e assignments to the expert and n = N K / E (StableMoE's balance).

    Lowers the weights of crowded experts and raises those of idle ones; 0 when all experts get the same number.
    """
    count_E = ranks.total(torch.bincount(index_NK.flatten(), minlength=experts))
    load_E = count_E.to(weight_NK.dtype) * experts / count_E.sum()
    return ((load_E - 1)[index_NK] * weight_NK).mean()


def importance_loss(*, probs_NE: Tensor) -> Tensor:
    """Squared coefficient of variation of the experts' total probability: 0 when all have the same (Shazeer et al. 2017)."""
    return _variation(probs_NE.sum(0))


def load_loss(*, scores_NE: Tensor, noisy_NE: Tensor, k: int, deviation: float) -> Tensor:
    """Squared coefficient of variation of the experts' expected numbers of tokens (Riquelme et al. 2021, appendix A).

    Expected over new Gaussian noise of this deviation on an expert's score, while the k-th highest noisy score stays what it is.
    """
    threshold_N1 = noisy_NE.topk(k, dim=-1).values[:, -1:]
    return _variation(torch.special.ndtr((scores_NE - threshold_N1) / deviation).sum(0))


def distillation_loss(*, scores_NE: Tensor, index_NK: Tensor) -> Tensor:
    """Cross-entropy of softmax(scores) to the experts chosen by another router, mean over assignments."""
    return -scores_NE.log_softmax(-1).gather(1, index_NK).mean()


def codebook_loss(*, x_ND: Tensor, value_ND: Tensor) -> Tensor:
    """||sg(x) - v||^2, mean over elements: pulls each code to its tokens (VQ-VAE, second term)."""
    return F.mse_loss(value_ND, x_ND.detach())


def commitment_loss(*, x_ND: Tensor, value_ND: Tensor) -> Tensor:
    """||x - sg(v)||^2, mean over elements: keeps tokens near their code (VQ-VAE, third term)."""
    return F.mse_loss(x_ND, value_ND.detach())


def _variation(total_E: Tensor) -> Tensor:
    total_E = ranks.total(total_E)
    return total_E.var(correction=0) / total_E.mean().square()
