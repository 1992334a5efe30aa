"""Codes as directions (Yu et al. 2022, ViT-VQGAN: l2-normalised codes).

Shapes: N tokens, D width, C codes.
"""

import math

import torch.nn.functional as F
from torch import Tensor

from pipeline.moe.quantizers.ema import Ema


class Cosine(Ema):
    """j(x) = argmax_j cos(x, v_j): `ema` with tokens and codes on a sphere, that of elements with mean square 1.

    Normalised tokens lie near it, so that a code there is a quantized token in the model's own scale.
    """

    def _encode(self, x_ND: Tensor) -> Tensor:
        return _on_sphere(x_ND)

    def _centres(self) -> Tensor:
        return _on_sphere(self.codebook_CD)


def _on_sphere(x: Tensor) -> Tensor:
    return F.normalize(x, dim=1) * math.sqrt(x.shape[1])
