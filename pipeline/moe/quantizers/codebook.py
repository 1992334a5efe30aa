"""A codebook: one vector per code, which tokens are compared with.

Shapes: N tokens, D width of the space in which tokens meet codes, C codes.
"""

import torch
from torch import Tensor, nn

from pipeline.moe.quantizers.base import Quantizer, Settings
from pipeline.moe.quantizers.kmeans import distances, kmeans


class Codebook(Quantizer):
    """j(x) = argmin_j ||e(x) - v_j||^2. A variant may override `_encode` (e) and `_centres` (v); it defines `_quantize`.

    Started by k-means. A dead code becomes a random token of the batch.
    """

    def __init__(self, settings: Settings, codebook_CD: nn.Parameter | nn.Buffer) -> None:
        super().__init__(settings)
        self.codebook_CD = codebook_CD

    @torch.no_grad()
    def nearest(self, x_ND: Tensor) -> Tensor:
        """Code of each token (N,); ties go to the lower code."""
        return self.scores(x_ND).argmax(1)

    @torch.no_grad()
    def scores(self, x_ND: Tensor) -> Tensor:
        """How near each code is (N, C): ||e(x)||^2 - ||e(x) - v_j||^2."""
        return -distances(self._encode(x_ND), self._centres())

    def _encode(self, x_ND: Tensor) -> Tensor:
        return x_ND

    def _centres(self) -> Tensor:
        return self.codebook_CD

    def _start(self, x_ND: Tensor) -> None:
        self.codebook_CD.copy_(kmeans(self._encode(x_ND), self.codes))

    def _revive(self, x_ND: Tensor, dead_C: Tensor) -> None:
        seeds = torch.randint(len(x_ND), (int(dead_C.sum()),))  # on the CPU, as k-means draws
        self.codebook_CD[dead_C] = self._encode(x_ND[seeds]).to(self.codebook_CD.dtype)

    def _repair(self, x_ND: Tensor, used_C: Tensor) -> None:
        centre_CD = kmeans(self._encode(x_ND), self.codes, kept_CD=self._centres()[used_C], kept_C=used_C)
        self.codebook_CD[~used_C] = centre_CD[~used_C]
