"""A codebook that the task trains too.

Shapes: N tokens, D width, C codes, G codebooks, P codes of each (P^G = C), B sequences, T positions.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.moe.losses import codebook_loss, commitment_loss
from pipeline.moe.quantizers.base import Quantized, Settings
from pipeline.moe.quantizers.kmeans import distances, kmeans
from pipeline.moe.quantizers.nearest import Nearest

# Against distances per element, which change far less than a router's scores do: at 1 assignments hardly learn.
TEMPERATURE = 0.05


class Task(Nearest):
    """As `nearest`, and the chosen expert's output is weighted by 1 + p_j - sg(p_j).

    p = softmax_j(-||x - v_j||^2 / (D t)), t = 0.05: the value stays 1, while the task moves tokens and codes towards each
    other where the expert of the code helps, and apart where it does not, as with a router's probability.

    With two codebooks a code is a pair: each half of the token's elements has its own codes, and the squared distance is the
    sum. Code (a, b) has the number a P + (a + b) mod P, so that both decide about the expert.

    With hysteresis a token keeps the code of the token before it unless another one leads by that much of a score.
    """

    def __init__(self, settings: Settings, width: int) -> None:
        super().__init__(settings, width)
        self.hysteresis, self.books = settings.hysteresis, settings.codebooks
        if self.books > 1:
            self.each = round(settings.codes ** (1 / self.books))
            assert self.each**self.books == settings.codes and self.books == 2 and width % 2 == 0
            self.codebook_CD = nn.Parameter(torch.randn(2 * self.each, width // 2))
            a, b = torch.arange(self.each)[:, None], torch.arange(self.each)
            self.register_buffer("number", (a * self.each + (a + b) % self.each).flatten())
            self.register_buffer("pair", torch.argsort(self.number))

    def _centres(self) -> Tensor:
        if self.books == 1:
            return self.codebook_CD
        first, second = self.codebook_CD.chunk(2)
        pairs = torch.cat([first.repeat_interleave(self.each, 0), second.repeat(self.each, 1)], 1)
        return pairs[self.pair]

    def _quantize(self, x_ND: Tensor) -> Quantized:
        centre_CD = self._centres()
        scores_NC = -distances(x_ND, centre_CD) / (x_ND.shape[1] * TEMPERATURE)
        code_N = scores_NC.argmax(1)
        if self.hysteresis:
            code_N = self._slow(scores_NC.detach(), code_N)
        chosen_N1 = scores_NC.softmax(1).gather(1, code_N[:, None])
        value_ND = F.embedding(code_N, centre_CD)
        losses = {
            "codebook": codebook_loss(x_ND=x_ND, value_ND=value_ND),
            "commitment": commitment_loss(x_ND=x_ND, value_ND=value_ND),
        }
        weight_N1 = 1 + (chosen_N1 - chosen_N1.detach())
        return Quantized(code_N, value_ND, weight_N1, None, losses["codebook"].detach(), losses, scores_NC)

    def _slow(self, scores_NC: Tensor, code_N: Tensor) -> Tensor:
        valid_BT = self.valid_BT
        scores_BTC = scores_NC.new_zeros(*valid_BT.shape, self.codes)
        scores_BTC[valid_BT] = scores_NC
        best_BT = torch.zeros_like(valid_BT, dtype=torch.long)
        best_BT[valid_BT] = code_N
        lead_BTC = scores_BTC.amax(2, keepdim=True) - scores_BTC <= self.hysteresis
        codes, code_B = [], best_BT[:, 0]
        for t in range(best_BT.shape[1]):
            code_B = torch.where(lead_BTC[:, t].gather(1, code_B[:, None])[:, 0], code_B, best_BT[:, t])
            codes.append(code_B)
        return torch.stack(codes, 1)[valid_BT]

    def _start(self, x_ND: Tensor) -> None:
        if self.books == 1:
            return super()._start(x_ND)
        self.codebook_CD.copy_(torch.cat([kmeans(half, self.each) for half in x_ND.chunk(2, 1)]))

    def _revive(self, x_ND: Tensor, dead_C: Tensor) -> None:
        # One code of many pairs cannot be moved alone: a half-code comes back when all of its pairs together are dead.
        if self.books == 1:
            return super()._revive(x_ND, dead_C)
        share = self.share_C[self.number].view(self.each, self.each)
        for book, used in enumerate((share.sum(1), share.sum(0))):
            for code in torch.nonzero(used < self.dead_share / self.each).flatten().tolist():
                seed = torch.randint(len(x_ND), (1,))
                self.codebook_CD[book * self.each + code] = x_ND[seed[0]].chunk(2)[book]

    def _repair(self, x_ND: Tensor, used_C: Tensor) -> None:
        if self.books == 1:
            super()._repair(x_ND, used_C)
