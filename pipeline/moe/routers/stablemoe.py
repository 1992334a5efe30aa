"""StableMoE: a learned router, distilled into a light one that then decides for good (Dai et al. 2022).

Shapes: N tokens, D width, E experts, K experts per token, T width of the light router's token embedding.
"""

from collections.abc import Sequence
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from pipeline.moe.losses import distillation_loss, overload_loss
from pipeline.moe.routers.base import Loss, Router, Routing, Settings, Sizes


class StableMoE(Router):
    """scores = x . e, the k largest, each with the weight sigmoid(score).

    Stage 1: these scores decide, and a light router that sees only token ids learns to agree. Stage 2, from the share
    `distil_share` of pre-training on: the light router decides and is frozen; the weights stay sigmoid(x . e).
    """

    class Settings(Settings):
        needs_ids: ClassVar[bool] = True

        top_k: Annotated[int, Field(gt=0)]
        balance: Annotated[float, Field(ge=0)]
        distil: Annotated[float, Field(ge=0)]
        distil_share: Annotated[float, Field(ge=0, le=1)]
        token_width: Annotated[int, Field(gt=0)]

    def __init__(self, settings: Settings, sizes: Sizes) -> None:
        super().__init__(settings)
        self.expert_ED = nn.Parameter(nn.init.orthogonal_(torch.empty(sizes.experts, sizes.width), gain=0.1))
        self.light = nn.Sequential(
            nn.Embedding(sizes.vocabulary, settings.token_width), nn.Linear(settings.token_width, sizes.experts, bias=False)
        )
        nn.init.orthogonal_(self.light[1].weight, gain=0.1)
        self.register_buffer("frozen", torch.tensor(False))
        self.register_load_state_dict_post_hook(_as_loaded)
        self._decided = False  # the same for the host, which would have to wait for a GPU to tell

    def forward(self, x_ND: Tensor, id_N: Tensor | None) -> Routing:
        assert id_N is not None, "stablemoe routes by token ids"
        scores_NE, light_NE = x_ND @ self.expert_ED.T, self.light(id_N)
        deciding_NE = light_NE.detach() if self._decided else scores_NE
        index_NK = deciding_NE.topk(self.settings.top_k, dim=-1).indices
        weight_NK = scores_NE.gather(1, index_NK).sigmoid()
        if self._decided:
            return Routing(index_NK, weight_NK, deciding_NE, {})
        balance = overload_loss(weight_NK=weight_NK, index_NK=index_NK, experts=scores_NE.shape[1])
        distil = distillation_loss(scores_NE=light_NE, index_NK=index_NK)
        losses = {"balance": Loss(balance, self.settings.balance), "distil": Loss(distil, self.settings.distil)}
        return Routing(index_NK, weight_NK, deciding_NE, losses)

    @staticmethod
    def begin_step(routers: Sequence["StableMoE"], done: float) -> None:
        for router in routers:
            if done >= router.settings.distil_share:
                router.frozen.fill_(True)
                router._decided = True

    def assignment_parameters(self) -> list[nn.Parameter]:
        return [self.expert_ED] if self._decided else list(self.parameters())


def _as_loaded(router: StableMoE, _: object) -> None:
    router._decided = bool(router.frozen)
