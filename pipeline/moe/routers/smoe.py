"""The learned linear router of a sparse mixture of experts (Shazeer et al. 2017; Switch Transformers for k = 1)."""

from typing import Annotated

from pydantic import Field
from torch import Tensor, nn

from pipeline.moe.losses import balance_loss
from pipeline.moe.routers.base import Loss, Routing, Settings


class SMoE(nn.Module):
    """scores = W x + b, the k largest, softmax over those."""

    class Settings(Settings):
        top_k: Annotated[int, Field(gt=0)]
        balance: Annotated[float, Field(ge=0)]

    def __init__(self, settings: Settings, width: int, experts: int) -> None:
        super().__init__()
        self.settings = settings
        self.scores = nn.Linear(width, experts)

    def forward(self, x_ND: Tensor) -> Routing:
        scores_NE = self.scores(x_ND)
        probs_NE = scores_NE.softmax(-1)
        top_NK, index_NK = scores_NE.topk(self.settings.top_k, dim=-1)
        if self.settings.top_k > 1:
            weight_NK = top_NK.softmax(-1)
        else:
            # A softmax over one score is the constant 1 and would leave the router without a gradient: keep the
            # value 1, and let the gradient be that of the chosen expert's probability.
            chosen_N1 = probs_NE.gather(1, index_NK)
            weight_NK = chosen_N1 + (1 - chosen_N1).detach()
        balance = balance_loss(probs_NE=probs_NE, index_NK=index_NK)
        return Routing(index_NK, weight_NK, scores_NE, {"balance": Loss(balance, self.settings.balance)})
