"""X-MoE's router: cosines in a small space (Chi et al. 2022, "On the representation collapse of sparse mixture of experts").

Shapes: N tokens, D width, E experts, K experts per token, P projected width.
"""

import math
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from pipeline.moe.losses import balance_loss
from pipeline.moe.routers.base import Loss, Router, Routing, Settings, Sizes, top_k


class XMoE(Router):
    """scores = cos(W x, e) / temperature, the k largest, softmax over those."""

    class Settings(Settings):
        top_k: Annotated[int, Field(gt=0)]
        balance: Annotated[float, Field(ge=0)]
        projection: Annotated[int, Field(gt=0)]
        temperature: Annotated[float, Field(gt=0)]

    def __init__(self, settings: Settings, sizes: Sizes) -> None:
        super().__init__(settings)
        self.project = nn.Linear(sizes.width, settings.projection, bias=False)
        self.expert_EP = nn.Parameter(nn.init.orthogonal_(torch.empty(sizes.experts, settings.projection), gain=0.1))
        # Learned as a logarithm, so that the temperature stays positive.
        self.log_temperature = nn.Parameter(torch.tensor(math.log(settings.temperature)))

    def forward(self, x_ND: Tensor, id_N: Tensor | None) -> Routing:
        cosine_NE = F.normalize(self.project(x_ND), dim=-1) @ F.normalize(self.expert_EP, dim=-1).T
        scores_NE = cosine_NE / self.log_temperature.exp()
        index_NK, weight_NK, probs_NE = top_k(scores_NE, self.settings.top_k)
        balance = balance_loss(probs_NE=probs_NE, index_NK=index_NK)
        return Routing(index_NK, weight_NK, scores_NE, {"balance": Loss(balance, self.settings.balance)})
