"""k-means, and the distances that it and the codebooks compare.

Shapes: N tokens, D width, C codes.
"""

import torch
from torch import Tensor

ROUNDS = 10


def distances(x_ND: Tensor, centre_CD: Tensor) -> Tensor:
    """||x - v||^2 (N, C), less ||x||^2, which is the same for every code."""
    return torch.addmm(centre_CD.square().sum(1), x_ND, centre_CD.T, alpha=-2)


def kmeans(x_ND: Tensor, codes: int, kept_CD: Tensor | None = None, kept_C: Tensor | None = None) -> Tensor:
    """Centres (C, D) after k-means++ seeding and Lloyd's rounds.

    Random draws come from torch's generator of the CPU, so that a GPU begins with the same codes.
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
        centre_CD[code] = x_ND[torch.multinomial(chances_N.cpu(), 1)]
        distance_N = torch.minimum(distance_N, (x_ND - centre_CD[code]).square().sum(1))
    for _ in range(ROUNDS):
        code_N = distances(x_ND, centre_CD).argmin(1)
        count_C = torch.bincount(code_N, minlength=codes)
        sum_CD = torch.zeros_like(centre_CD).index_add_(0, code_N, x_ND)
        moves_C = (count_C > 0) & ~kept_C
        centre_CD = torch.where(moves_C[:, None], sum_CD / count_C.clamp(min=1)[:, None], centre_CD)
    return centre_CD
