"""Codes in a learned projection of few dimensions (Yu et al. 2022, ViT-VQGAN: factorised codes).

Shapes: N tokens, D width of the model, L width of the codes, C codes.
"""

import math

import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.moe.losses import codebook_loss, commitment_loss
from pipeline.moe.quantizers.base import Quantized, Settings
from pipeline.moe.quantizers.ema import Ema
from pipeline.moe.quantizers.projection import principal


class LowDim(Ema):
    """j(x) = argmin_j ||P x - v_j||^2, and the quantized token is Q v_j: a linear VQ-VAE of the tokens.

    P and Q are affine and start at the tokens' principal directions; the codes are moving averages of P x. The codebook
    loss trains P and Q, with tokens and codes as constants: ||x - Q v_j||^2, straight through to P, and ||P x - v_j||^2.
    vector-quantize-pytorch leaves the first to what reads the quantized token: with `input: residual` nothing does, and
    P would shrink to please the second.
    """

    def __init__(self, settings: Settings, width: int) -> None:
        code_width = min(settings.code_width, width)
        super().__init__(settings, code_width)
        self.down, self.up = nn.Linear(width, code_width), nn.Linear(code_width, width)

    def _encode(self, x_ND: Tensor) -> Tensor:
        return self.down(x_ND)

    def _start(self, x_ND: Tensor) -> None:
        mean_D, direction_LD = x_ND.mean(0), principal(x_ND, self.down.out_features)
        # With means over L and D elements, the two losses balance where |P| / |Q| is L / D.
        scale = math.sqrt(len(direction_LD) / len(mean_D))
        self.down.weight.copy_(direction_LD * scale)
        self.down.bias.copy_(-self.down.weight @ mean_D)
        self.up.weight.copy_(direction_LD.T / scale)
        self.up.bias.copy_(mean_D)
        super()._start(x_ND)

    def _quantize(self, x_ND: Tensor) -> Quantized:
        scores_NC, z_NL = self.scores(x_ND), self.down(x_ND.detach())
        code_N = scores_NC.argmax(1)
        v_NL = F.embedding(code_N, self.codebook_CD)
        value_ND = self.up(v_NL.detach() + (z_NL - z_NL.detach()))
        codebook = codebook_loss(x_ND=x_ND, value_ND=value_ND)
        losses = {
            "codebook": codebook + F.mse_loss(v_NL, z_NL),
            "commitment": commitment_loss(x_ND=x_ND, value_ND=value_ND),
        }
        return Quantized(code_N, lambda: value_ND, None, None, codebook.detach(), losses, scores_NC)
