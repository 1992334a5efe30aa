"""The learned linear router of a sparse mixture of experts (Shazeer et al. 2017; Switch Transformers for k = 1)."""

from typing import Annotated

from pydantic import Field
from torch import Tensor, nn

from pipeline.moe.losses import balance_loss
from pipeline.moe.routers.base import Loss, Router, Routing, Settings, Sizes, top_k


class SMoE(Router):
    """scores = W x + b, the k largest, softmax over those."""

    class Settings(Settings):
        top_k: Annotated[int, Field(gt=0)]
        balance: Annotated[float, Field(ge=0)]

    def __init__(self, settings: Settings, sizes: Sizes) -> None:
        super().__init__(settings)
        self.scores = nn.Linear(sizes.width, sizes.experts)

    def forward(self, x_ND: Tensor, id_N: Tensor | None) -> Routing:
        scores_NE = self.scores(x_ND)
        index_NK, weight_NK, probs_NE = top_k(scores_NE, self.settings.top_k)
        balance = balance_loss(probs_NE=probs_NE, index_NK=index_NK)
        return Routing(index_NK, weight_NK, scores_NE, {"balance": Loss(balance, self.settings.balance)})
