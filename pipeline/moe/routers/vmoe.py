"""V-MoE's router: an expert takes so many tokens and no more (Riquelme et al. 2021, "Scaling vision with sparse MoE").

Shapes: N tokens, D width, E experts, K experts per token.
"""

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from pipeline.moe.losses import importance_loss, load_loss
from pipeline.moe.routers.base import Loss, Router, Routing, Settings, Sizes


class VMoE(Router):
    """scores = W x, the k largest, with their weights in the softmax over all; noise of deviation 1/E on scores while training.

    In training an expert takes round(k N capacity / E) tokens of a batch, at least one; capacity 0 is no limit. All first choices
    come before all second ones, each in the order of the batch or, with `priority: batch`, of the tokens' largest weights. Who
    comes too late has no expert (-1) for that choice. After training there is no limit: with one, the answer to an image would
    depend on its neighbours in the batch. The losses are the mean of the paper's importance and load losses, the latter without
    noise where there is none; `dropped`, of weight 0, is the share of the choices that came too late.
    """

    class Settings(Settings):
        top_k: Annotated[int, Field(gt=0)]
        balance: Annotated[float, Field(ge=0)]
        capacity: Annotated[float, Field(ge=0)]
        priority: Literal["batch", "none"]

        @property
        def causal(self) -> bool:
            return not self.capacity

    def __init__(self, settings: Settings, sizes: Sizes) -> None:
        super().__init__(settings)
        self.scores = nn.Linear(sizes.width, sizes.experts, bias=False)

    def forward(self, x_ND: Tensor, id_N: Tensor | None) -> Routing:
        scores_NE = self.scores(x_ND)
        k, experts = self.settings.top_k, scores_NE.shape[1]
        noisy_NE = scores_NE + torch.randn_like(scores_NE) / experts if self.training else scores_NE
        index_NK = noisy_NE.topk(k, dim=-1).indices
        weight_NK = noisy_NE.softmax(-1).gather(1, index_NK)
        importance = importance_loss(probs_NE=scores_NE.softmax(-1))
        load = load_loss(scores_NE=scores_NE, noisy_NE=noisy_NE, k=k, deviation=1 / experts)
        half = self.settings.balance / 2
        losses = {"importance": Loss(importance, half), "load": Loss(load, half)}
        if self.training and self.settings.capacity:
            index_NK = self._within_capacity(index_NK, weight_NK, experts)
            losses["dropped"] = Loss((index_NK < 0).to(x_ND.dtype).mean(), 0.0)
        return Routing(index_NK, weight_NK, noisy_NE, losses)

    def _within_capacity(self, index_NK: Tensor, weight_NK: Tensor, experts: int) -> Tensor:
        """The choices that their experts still take, -1 for the others."""
        capacity = max(1, round(index_NK.numel() * self.settings.capacity / experts))
        order_N = torch.arange(len(index_NK), device=index_NK.device)
        if self.settings.priority == "batch":
            order_N = weight_NK[:, 0].argsort(descending=True, stable=True)
        queue_KN = index_NK[order_N].T
        before_A = F.one_hot(queue_KN.flatten(), experts).cumsum(0).gather(1, queue_KN.reshape(-1, 1))
        taken_NK = (before_A <= capacity).view_as(queue_KN).T
        return index_NK.index_put((order_N,), index_NK[order_N].where(taken_NK, -1))
