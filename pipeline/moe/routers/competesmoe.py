"""CompeteSMoE: now and then all experts run, and the router learns whose answer is strongest (Pham et al. 2024, 2025).

Shapes: N tokens, D width, E experts, K experts per token.
"""

import math
from collections.abc import Sequence
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from pipeline import ranks
from pipeline.moe.chance import happens
from pipeline.moe.losses import balance_loss
from pipeline.moe.routers.base import Loss, Router, Routing, Settings, Sizes, top_k


class CompeteSMoE(Router):
    """scores = W x, the k largest, softmax over those; in a competing step the scores are the experts' affinities.

    An expert's affinity to a token is the mean of softplus over its output. The router's softmax learns that of the
    winners' affinities (zero for the others) by mean squared error.
    """

    class Settings(Settings):
        top_k: Annotated[int, Field(gt=0)]
        balance: Annotated[float, Field(ge=0)]
        distil: Annotated[float, Field(ge=0)]
        compete: Annotated[float, Field(ge=0, le=1)]
        at_once: Annotated[int, Field(gt=0)]

        def chance(self, layers: int) -> float:
            """Mean number of layers that compete, over the most that do at once."""
            most, p = min(self.at_once, layers), self.compete
            drawn = (math.comb(layers, n) * p**n * (1 - p) ** (layers - n) for n in range(layers + 1))
            return sum(min(n, most) * probability for n, probability in enumerate(drawn)) / most

    def __init__(self, settings: Settings, sizes: Sizes) -> None:
        super().__init__(settings)
        self.scores = nn.Linear(sizes.width, sizes.experts, bias=False)
        self.competing = False

    def forward(self, x_ND: Tensor, id_N: Tensor | None) -> Routing:
        scores_NE = self.scores(x_ND)
        if self.training and self.competing:
            every_NE = torch.arange(scores_NE.shape[1], device=x_ND.device).expand_as(scores_NE)
            return Routing(every_NE, None, scores_NE, {})
        index_NK, weight_NK, probs_NE = top_k(scores_NE, self.settings.top_k)
        return Routing(index_NK, weight_NK, scores_NE, self._balance(probs_NE, index_NK))

    def settle(self, routing: Routing, y_NKD: Tensor) -> tuple[Routing, Tensor]:
        self.competing = False
        affinity_NE = F.softplus(y_NKD).mean(-1)
        index_NK, weight_NK, probs_NE = top_k(affinity_NE, self.settings.top_k)
        target_NE = torch.zeros_like(affinity_NE).scatter(1, index_NK, weight_NK.detach())
        distil = F.mse_loss(routing.scores_NE.softmax(-1), target_NE)
        losses = self._balance(probs_NE, index_NK) | {"distil": Loss(distil, self.settings.distil)}
        winner_NKD = y_NKD.gather(1, index_NK[..., None].expand(-1, -1, y_NKD.shape[-1]))
        return Routing(index_NK, weight_NK, affinity_NE, losses), winner_NKD

    @staticmethod
    def begin_step(routers: Sequence["CompeteSMoE"], done: float) -> None:
        """Draw which layers compete in this step: each with probability `compete`, at most `at_once` of those drawn."""
        drawn = torch.tensor([place for place, router in enumerate(routers) if happens(router.settings.compete)])
        chosen = drawn[torch.randperm(len(drawn))[: routers[0].settings.at_once]].long()
        competing = ranks.agreed(torch.zeros(len(routers), dtype=torch.bool).index_fill(0, chosen, True))
        for router, competes in zip(routers, competing.tolist(), strict=True):
            router.competing = competes

    def _balance(self, probs_NE: Tensor, index_NK: Tensor) -> dict[str, Loss]:
        return {"balance": Loss(balance_loss(probs_NE=probs_NE, index_NK=index_NK), self.settings.balance)}
