"""The paper's quantizer: the nearest code, from a codebook that learns by its own loss (METHOD section 1, VQ-VAE).

Shapes: N tokens, D width, C codes.
"""

import torch
from torch import Tensor, nn

from pipeline.moe.losses import quantize
from pipeline.moe.quantizers.base import Quantized, Settings
from pipeline.moe.quantizers.codebook import Codebook


class Nearest(Codebook):
    """j(x) = argmin_j ||x - v_j||^2; the codebook loss pulls each code to its tokens."""

    def __init__(self, settings: Settings, width: int) -> None:
        super().__init__(settings, nn.Parameter(torch.randn(settings.codes, width)))

    def _quantize(self, x_ND: Tensor) -> Quantized:
        scores_NC = self.scores(x_ND)
        return self._of(x_ND, scores_NC.argmax(1), scores_NC)

    def _of(self, x_ND: Tensor, code_N: Tensor, scores_NC: Tensor) -> Quantized:
        value_ND, codebook, commitment = quantize(x_ND=x_ND, codebook_CD=self.codebook_CD, code_N=code_N)
        losses = {"codebook": codebook, "commitment": commitment}
        return Quantized(code_N, value_ND, None, None, codebook.detach(), losses, scores_NC)
