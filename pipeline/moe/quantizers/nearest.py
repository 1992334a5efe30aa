"""The paper's quantizer: the nearest code, from a codebook that learns by its own loss (METHOD section 1, VQ-VAE).

Shapes: N tokens, D width, C codes.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.moe.quantizers.base import Quantized, Settings
from pipeline.moe.quantizers.codebook import Codebook
from pipeline.moe.quantizers.kmeans import distances


class Nearest(Codebook):
    """j(x) = argmin_j ||x - v_j||^2; the codebook loss pulls each code to its tokens."""

    def __init__(self, settings: Settings, width: int) -> None:
        super().__init__(settings, nn.Parameter(torch.randn(settings.codes, width)))

    def _quantize(self, x_ND: Tensor) -> Quantized:
        distance_NC, code_N, codebook, commitment = compare(x_ND, self.codebook_CD)
        return self._of(code_N, codebook, commitment, -distance_NC.detach(), None)

    def _of(self, code_N: Tensor, codebook: Tensor, commitment: Tensor, scores_NC: Tensor, weight_N1: Tensor | None) -> Quantized:
        losses = {"codebook": codebook, "commitment": commitment}
        value = partial(F.embedding, code_N, self.codebook_CD.detach())
        return Quantized(code_N, value, weight_N1, None, codebook.detach(), losses, scores_NC)


def compare(x_ND: Tensor, codebook_CD: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Distances ||x - v||^2 - ||x||^2 (N, C), the nearest code (N,), and the codebook and the commitment loss of these codes.

    As `distances`, `codebook_loss` and `commitment_loss` (whose values are equal), in a few passes over the tokens: all that
    tokens and codes get as gradients is one product with a matrix (N, C) each, and a multiple of themselves.
    """
    return _Compare.apply(x_ND, codebook_CD)


class _Compare(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, codebook_CD: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        distance_NC = distances(x_ND, codebook_CD)
        least_N, code_N = distance_NC.min(1)
        # What rounding leaves of a token on its code can be less than nothing.
        error = ((torch.linalg.vector_norm(x_ND).square() + least_N.sum()) / x_ND.numel()).clamp(min=0)
        ctx.save_for_backward(x_ND, codebook_CD, code_N)
        ctx.mark_non_differentiable(code_N)
        ctx.set_materialize_grads(False)
        return distance_NC, code_N, error, error.clone()

    @staticmethod
    def backward(
        ctx: Any, distance_NC: Tensor | None, _: None, codebook: Tensor | None, commitment: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        x_ND, codebook_CD, code_N = ctx.saved_tensors
        code_N1, dx_ND, dcodebook_CD = code_N[:, None], None, None
        codebook, commitment = (x_ND.new_zeros(()) if one is None else 2 * one / x_ND.numel() for one in (codebook, commitment))
        pull_NC = x_ND.new_zeros(len(x_ND), len(codebook_CD)) if distance_NC is None else -2 * distance_NC
        chosen_N1 = pull_NC.gather(1, code_N1)
        if ctx.needs_input_grad[0]:
            dx_ND = pull_NC.scatter_(1, code_N1, chosen_N1 - commitment) @ codebook_CD
            dx_ND.addcmul_(x_ND, commitment)
        if ctx.needs_input_grad[1]:
            pull_NC.scatter_(1, code_N1, chosen_N1 - codebook)
            dcodebook_CD = pull_NC.T @ x_ND - pull_NC.sum(0)[:, None] * codebook_CD
        return dx_ND, dcodebook_CD
