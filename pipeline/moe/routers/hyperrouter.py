"""HyperRouter: a frozen hypernetwork makes the router out of a learned embedding (Do et al. 2023).

Shapes: N tokens, D width, E experts, H width of the hypernetwork, R = E (D + 1) numbers of a linear router.
"""

from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from pipeline.moe.routers.base import Sizes
from pipeline.moe.routers.smoe_dropout import GrowingRouter


class HyperRouter(GrowingRouter):
    """scores = W x + b, where [W, b] = relu(embedding A) B with frozen A and B."""

    class Settings(GrowingRouter.Settings):
        hypernet_width: Annotated[int, Field(gt=0)]

    def __init__(self, settings: Settings, sizes: Sizes) -> None:
        super().__init__(settings, sizes)
        width, hidden, experts = sizes.width, settings.hypernet_width, sizes.experts
        self.embedding_D = nn.Parameter(torch.randn(width))
        # With an embedding of variance 1, A of variance 1/D keeps it, relu halves the second moment, and B of variance
        # 2/(3 D H) makes W and b of variance 1/(3 D), that of a default nn.Linear. Biases, frozen at zero, are left out.
        self.register_buffer("a_DH", torch.randn(width, hidden) / width**0.5)
        self.register_buffer("b_HR", torch.randn(hidden, experts * (width + 1)) * (2 / (3 * width * hidden)) ** 0.5)

    def scores(self, x_ND: Tensor) -> Tensor:
        router_ED1 = (F.relu(self.embedding_D[None] @ self.a_DH) @ self.b_HR).view(self.experts, -1)
        return F.linear(x_ND, router_ED1[:, :-1], router_ED1[:, -1])
