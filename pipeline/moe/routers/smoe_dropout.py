"""SMoE-Dropout: a random frozen router that asks ever more experts (Chen et al. 2023, "Sparse MoE as the new dropout").

Shapes: N tokens, D width, E experts, K experts per token.
"""

from collections.abc import Sequence
from typing import Annotated

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from pipeline.moe.routers.base import Mode, Router, Routing, Settings, Sizes, top_k


class GrowingRouter(Router):
    """Base of routers that ask from E/2 to all E experts while pre-training, rising linearly with the steps.

    Mode `dense` is that schedule, and all E experts at evaluation; mode `router` asks the `top_k` best. No balance loss.
    """

    modes: tuple[Mode, ...] = ("dense", "router")

    class Settings(Settings):
        top_k: Annotated[int, Field(gt=0)]

    def __init__(self, settings: Settings, sizes: Sizes) -> None:
        super().__init__(settings)
        self.experts = sizes.experts
        self.begin_step([self], 0.0)

    def scores(self, x_ND: Tensor) -> Tensor:
        """Scores (N, E) of all experts."""
        raise NotImplementedError

    def forward(self, x_ND: Tensor, id_N: Tensor | None) -> Routing:
        return self._best(x_ND, self.settings.top_k)

    def dense(self, x_ND: Tensor, id_N: Tensor | None) -> Routing:
        """The answer in mode `dense`."""
        return self._best(x_ND, self.growing if self.training else self.experts)

    @staticmethod
    def begin_step(routers: Sequence["GrowingRouter"], done: float) -> None:
        for router in routers:
            half = max(1, router.experts // 2)
            router.growing = half + round((router.experts - half) * done)

    def _best(self, x_ND: Tensor, k: int) -> Routing:
        scores_NE = self.scores(x_ND)
        index_NK, weight_NK, _ = top_k(scores_NE, k)
        return Routing(index_NK, weight_NK, scores_NE, {})


class SMoEDropout(GrowingRouter):
    """scores = W x + b with W and b as drawn."""

    def __init__(self, settings: GrowingRouter.Settings, sizes: Sizes) -> None:
        super().__init__(settings, sizes)
        drawn = nn.Linear(sizes.width, sizes.experts)
        self.register_buffer("weight_ED", drawn.weight.detach())
        self.register_buffer("bias_E", drawn.bias.detach())

    def scores(self, x_ND: Tensor) -> Tensor:
        return F.linear(x_ND, self.weight_ED, self.bias_E)
