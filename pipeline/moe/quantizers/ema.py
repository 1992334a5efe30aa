"""A codebook of moving averages (van den Oord et al. 2017, appendix A.1), which no optimizer moves.

Written here rather than taken from vector-quantize-pytorch, whose codebook starts by k-means in evaluation too, judges
dead codes by counts that depend on the batch's size, forgets that it is frozen when saved, asks the host in every pass
whether it has started and multiplies by a one-hot (N, C) matrix. A test compares the two.

Shapes: N tokens, D width, C codes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline import ranks
from pipeline.moe.losses import commitment_loss
from pipeline.moe.quantizers.base import Quantized, Settings
from pipeline.moe.quantizers.codebook import Codebook


class Ema(Codebook):
    """v_j = moving sum of the tokens of code j / moving number of them. There is no codebook loss."""

    # A young model's tokens drift: averages over a hundred steps fall behind, and codes die.
    decay = 0.9

    def __init__(self, settings: Settings, width: int) -> None:
        super().__init__(settings, nn.Buffer(torch.randn(settings.codes, width)))

    def _quantize(self, x_ND: Tensor) -> Quantized:
        scores_NC = self.scores(x_ND)
        code_N = scores_NC.argmax(1)
        value_ND = F.embedding(code_N, self._centres())
        commitment = commitment_loss(x_ND=x_ND, value_ND=value_ND)
        return Quantized(code_N, lambda: value_ND, None, None, commitment.detach(), {"commitment": commitment}, scores_NC)

    def _follow(self, x_ND: Tensor, code_N: Tensor, count_C: Tensor) -> None:
        # The moving sum is v times the moving share, so that it need not be kept: v moves to the mean of its tokens by
        # the part that they have in the new share. A code unused for thousands of steps has a share of 0 and stays.
        sum_CD = ranks.total(torch.zeros_like(self.codebook_CD).index_add_(0, code_N, self._encode(x_ND))) / count_C.sum()
        used_C = count_C.to(sum_CD.dtype) / count_C.sum()
        step_CD = (1 - self.decay) * (sum_CD - used_C[:, None] * self.codebook_CD)
        self.codebook_CD.add_(step_CD / self.share_C[:, None].clamp(min=torch.finfo(step_CD.dtype).tiny))
