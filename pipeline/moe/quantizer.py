"""Vector quantizer: a token's nearest code, a codebook that follows the tokens and stays alive.

Shapes: N tokens, D width, C codes.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.moe.losses import codebook_loss, commitment_loss

EMA_DECAY = 0.99
KMEANS_ROUNDS = 10


class Quantized(NamedTuple):
    code_N: Tensor
    value_ND: Tensor
    codebook_loss: Tensor
    commitment_loss: Tensor


class VectorQuantizer(nn.Module):
    """j(x) = argmin_j ||x - v_j||^2 over a codebook V (C, D) that learns by the codebook loss (METHOD, VQ-VAE).

    The first training batch starts the codebook by k-means. While training, a code whose moving share of the tokens
    falls under `dead_share` / C is re-seeded with a token of the batch. All state lives in parameters and buffers.
    """

    def __init__(self, codes: int, width: int, dead_share: float) -> None:
        super().__init__()
        self.codes, self.dead_share = codes, dead_share
        self.codebook_CD = nn.Parameter(torch.randn(codes, width))
        self.register_buffer("share_C", torch.full((codes,), 1 / codes))
        self.register_buffer("started", torch.tensor(False))
        self.register_buffer("frozen", torch.tensor(False))

    def forward(self, x_ND: Tensor) -> Quantized:
        learning = self.training and not self.frozen
        if learning:
            if not self.started:
                self.start(x_ND)
            self._revive(x_ND)
        code_N = self.nearest(x_ND)
        if learning:
            used_C = torch.bincount(code_N, minlength=self.codes).to(self.share_C.dtype) / len(code_N)
            self.share_C.lerp_(used_C, 1 - EMA_DECAY)
        value_ND = F.embedding(code_N, self.codebook_CD)
        return Quantized(
            code_N, value_ND, codebook_loss(x_ND=x_ND, value_ND=value_ND), commitment_loss(x_ND=x_ND, value_ND=value_ND)
        )

    @torch.no_grad()
    def nearest(self, x_ND: Tensor) -> Tensor:
        """Code of each token; ties go to the lower code."""
        return _nearest(x_ND, self.codebook_CD)

    @torch.no_grad()
    def start(self, x_ND: Tensor) -> None:
        """(Re)place the codebook by the k-means centres of these tokens (N >= C; fewer are repeated)."""
        self.codebook_CD.copy_(kmeans(x_ND.detach(), self.codes))
        self.share_C.fill_(1 / self.codes)
        self.started.fill_(True)

    @torch.no_grad()
    def repair(self, x_ND: Tensor) -> None:
        """Give every code tokens: those that none of these tokens uses move to where tokens are far from the others.

        Codes in use stay, since experts have learnt what they stand for. An unstarted codebook is started.
        """
        if not self.started:
            self.start(x_ND)
            return
        used_C = torch.bincount(self.nearest(x_ND), minlength=self.codes) > 0
        if not used_C.all():
            self.codebook_CD.copy_(kmeans(x_ND, self.codes, kept_CD=self.codebook_CD[used_C], kept_C=used_C))
            self.share_C.fill_(1 / self.codes)

    def freeze(self) -> None:
        """No code moves any more: neither by gradient nor by re-seeding. Saved with the model."""
        self.frozen.fill_(True)
        self.codebook_CD.requires_grad_(False)

    def _revive(self, x_ND: Tensor) -> None:
        dead_C = self.share_C < self.dead_share / self.codes
        if dead_C.any():
            with torch.no_grad():
                seeds = torch.randint(len(x_ND), (int(dead_C.sum()),), device=x_ND.device)
                self.codebook_CD[dead_C] = x_ND[seeds].to(self.codebook_CD.dtype)
                self.share_C[dead_C] = 1 / self.codes


def kmeans(x_ND: Tensor, codes: int, kept_CD: Tensor | None = None, kept_C: Tensor | None = None) -> Tensor:
    """Centres (C, D) after k-means++ seeding and Lloyd's rounds; random draws from torch's generator.

    With `kept_CD`, the codes where `kept_C` is true have those centres and keep them.
    """
    if kept_CD is None or kept_C is None:
        kept_CD, kept_C = x_ND[:0], torch.zeros(codes, dtype=torch.bool, device=x_ND.device)
    centre_CD = torch.empty(codes, x_ND.shape[1], dtype=x_ND.dtype, device=x_ND.device)
    centre_CD[kept_C] = kept_CD
    distance_N = torch.cdist(x_ND, kept_CD).square().amin(1) if len(kept_CD) else torch.full_like(x_ND[:, 0], torch.inf)
    for code in torch.nonzero(~kept_C).flatten().tolist():
        # No centre yet, or every token coincides with one (constant input): any token is as good as another.
        uniform = distance_N.isinf().any() or distance_N.sum() == 0
        chances_N = torch.ones_like(distance_N) if uniform else distance_N
        centre_CD[code] = x_ND[torch.multinomial(chances_N, 1)]
        distance_N = torch.minimum(distance_N, (x_ND - centre_CD[code]).square().sum(1))
    for _ in range(KMEANS_ROUNDS):
        code_N = _nearest(x_ND, centre_CD)
        count_C = torch.bincount(code_N, minlength=codes)
        sum_CD = torch.zeros_like(centre_CD).index_add_(0, code_N, x_ND)
        moves_C = (count_C > 0) & ~kept_C
        centre_CD = torch.where(moves_C[:, None], sum_CD / count_C.clamp(min=1)[:, None], centre_CD)
    return centre_CD


def _nearest(x_ND: Tensor, centre_CD: Tensor) -> Tensor:
    # ||x||^2 is the same for every code and left out.
    return torch.addmm(centre_CD.square().sum(1), x_ND, centre_CD.T, alpha=-2).argmin(1)
