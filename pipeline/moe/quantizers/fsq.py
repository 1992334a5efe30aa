"""Finite scalar quantization (Mentzer et al. 2023): no codebook, but a token's projection rounded to a small grid.

Shapes: N tokens, D width, G digits, C codes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.moe.losses import codebook_loss
from pipeline.moe.quantizers.base import Quantized, Quantizer, Settings
from pipeline.moe.quantizers.projection import covariance, principal


class Fsq(Quantizer):
    """The code of x is the number with the digits round(tanh(P x)); the prime factors of C are the digits' levels.

    Two affine maps read the digits. Q, the quantized token, learns by the codebook loss. The embedding, 0 at first, is
    what `input: residual` adds to the token; through it, and straight through the rounding, the task trains P and the
    tokens. With another `input` nothing trains P.

    A code of a grid cannot move alone: where one is dead or unused, P is centred and decorrelated anew, if that brings most of
    those back. Tokens in few clusters never fill a grid, and what the optimizer trains there is not to be overwritten in vain.
    """

    embeds = True
    # A young model's tokens drift out of the grid within a hundred steps.
    decay = 0.9

    def __init__(self, settings: Settings, width: int) -> None:
        super().__init__(settings)
        # Here, because it loads torch's compiler too, for which every command would wait more than a second.
        from vector_quantize_pytorch import FSQ

        levels = _prime_factors(settings.codes)
        # Only with symmetry does the library know digits of two levels.
        self.grid = FSQ(levels, preserve_symmetry=True)
        self.down, self.up = nn.Linear(width, len(levels)), nn.Linear(len(levels), width)
        self.embedding = nn.Linear(len(levels), width)
        nn.init.zeros_(self.embedding.weight)
        nn.init.zeros_(self.embedding.bias)

    def freeze(self) -> None:
        """As its base's; the embedding goes on learning, as that of a codebook's codes does."""
        super().freeze()
        self.embedding.requires_grad_(True)

    @torch.no_grad()
    def nearest(self, x_ND: Tensor) -> Tensor:
        """Code of each token (N,)."""
        return self._digits(x_ND)[1]

    def _digits(self, x_ND: Tensor) -> tuple[Tensor, Tensor]:
        digits_1NG, code_1N = self.grid(self.down(x_ND)[None])
        return digits_1NG[0], code_1N[0].long()

    def _start(self, x_ND: Tensor) -> None:
        self.down.weight.copy_(principal(x_ND, self.down.out_features))
        self._spread(x_ND)

    def _revive(self, x_ND: Tensor, dead_C: Tensor) -> None:
        trained = [*self.down.parameters(), *self.up.parameters()]
        before, dead = [parameter.clone() for parameter in trained], self._without(x_ND)
        self._spread(x_ND)
        if 2 * self._without(x_ND) >= dead:
            for parameter, was in zip(trained, before, strict=True):
                parameter.copy_(was)

    def _repair(self, x_ND: Tensor, used_C: Tensor) -> None:
        self._revive(x_ND, ~used_C)

    def _without(self, x_ND: Tensor) -> int:
        """How many codes get so few of these tokens that they would die of it, or none."""
        count_C = torch.bincount(self.nearest(x_ND), minlength=self.codes)
        return int((count_C <= self.dead_share / self.codes * len(x_ND)).sum())

    def _spread(self, x_ND: Tensor) -> None:
        """Decorrelate P x to unit variance, by the root that turns its directions least, with medians at 0; fit Q."""
        variance_G, axis_GG = torch.linalg.eigh(covariance(F.linear(x_ND, self.down.weight)))
        # The floor is for too few or constant tokens.
        root_GG = (axis_GG * variance_G.clamp(min=1e-4).rsqrt()) @ axis_GG.T
        self.down.weight.copy_(root_GG @ self.down.weight)
        self.down.bias.copy_(-F.linear(x_ND, self.down.weight).quantile(0.5, dim=0))
        digits_NG, mean_D = self._digits(x_ND)[0], x_ND.mean(0)
        self.up.weight.copy_((x_ND - mean_D).T @ digits_NG / len(x_ND))
        self.up.bias.copy_(mean_D)

    def _quantize(self, x_ND: Tensor) -> Quantized:
        digits_NG, code_N = self._digits(x_ND)
        value_ND = self.up(digits_NG.detach())
        codebook = codebook_loss(x_ND=x_ND, value_ND=value_ND)
        return Quantized(code_N, lambda: value_ND, None, self.embedding(digits_NG), codebook.detach(), {"codebook": codebook})


def _prime_factors(number: int) -> list[int]:
    """Largest first: the first digits are the directions in which tokens vary most."""
    factors, candidate = [], 2
    while number > 1:
        while number % candidate == 0:
            factors.append(candidate)
            number //= candidate
        candidate += 1
    return factors[::-1]
