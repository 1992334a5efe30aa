"""Mixture-of-experts layers: experts, dispatch and a router or a quantizer put together.

Shapes: N tokens, D width, E experts, K assignments per token, C codes.
"""

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from pipeline.moe.dispatch import apply_experts, combine
from pipeline.moe.experts import Experts, FeedForward
from pipeline.moe.quantizer import VectorQuantizer
from pipeline.moe.released import VQMoEReleased
from pipeline.moe.routers import ROUTERS
from pipeline.moe.routers.base import LayerOutput, Loss, Mode, Router, Settings, Sizes
from pipeline.moe.routers.smoe import SMoE


class SparseMoE(nn.Module):
    """y = sum_k w_k FFN_k(x) over the experts a router chose, in the modes that the router knows."""

    def __init__(self, router: Router, experts: Experts) -> None:
        super().__init__()
        self.router, self.experts = router, experts
        self.train_mode, self.infer_mode = router.train_mode, router.infer_mode

    def forward(self, x_ND: Tensor, mode: Mode, id_N: Tensor | None = None) -> LayerOutput:
        assert mode in (self.train_mode, self.infer_mode), mode
        route = self.router.dense if mode == "dense" else self.router
        routing = route(x_ND, id_N)
        routing, y_NKD = self.router.settle(routing, apply_experts(self.experts, x_ND, routing.index_NK))
        return LayerOutput(combine(y_NKD, routing.weight_NK), routing.losses, routing.index_NK, None)

    def assignment_parameters(self) -> list[nn.Parameter]:
        """What decides the assignment and still learns: the router, or a part of it."""
        return self.router.assignment_parameters()

    def freeze_assignment(self) -> None:
        """Nothing to freeze: a learned router goes on learning in fine-tuning, a frozen one is frozen."""


class Dense(nn.Module):
    """y = FFN(x) with k times the hidden width of an expert: the active FLOPs of k experts, without a router."""

    train_mode: Mode = "dense"
    infer_mode: Mode = "dense"

    class Settings(Settings):
        top_k: Annotated[int, Field(gt=0)]

    def __init__(self, settings: Settings, sizes: Sizes) -> None:
        super().__init__()
        self.experts = FeedForward(sizes.width, settings.top_k * sizes.hidden, sizes.dropout)

    def forward(self, x_ND: Tensor, mode: Mode, id_N: Tensor | None = None) -> LayerOutput:
        assert mode == "dense", mode
        return LayerOutput(self.experts(x_ND), {}, x_ND.new_zeros(len(x_ND), 1, dtype=torch.long), None)

    def assignment_parameters(self) -> list[nn.Parameter]:
        """Nothing decides."""
        return []

    def freeze_assignment(self) -> None:
        """Nothing to freeze."""


class VQMoE(nn.Module):
    """A routed and a discrete path over the same experts (Do et al. 2024, METHOD section 1).

    `both` runs the two paths side by side through one grouped product, `discrete` only the code's expert (no router,
    no gate), `router` only the routed path.
    """

    train_mode: Mode = "both"
    infer_mode: Mode = "discrete"

    class Settings(Settings):
        top_k: Annotated[int, Field(gt=0)]
        balance: Annotated[float, Field(ge=0)]
        codes: Annotated[int, Field(gt=0)]
        input: Literal["code", "blend", "residual"]
        blend: Annotated[float, Field(ge=0, le=1)]
        combine: Literal["gate", "sum"]
        drop_routed: Annotated[float, Field(ge=0, lt=1)]
        beta: Annotated[float, Field(ge=0)]
        commitment: Annotated[float, Field(ge=0)]
        dead_share: Annotated[float, Field(ge=0, lt=1)]

        def check(self, experts: int) -> None:
            super().check(experts)
            if self.codes % experts:
                raise ValueError(f"codes is {self.codes}: must be a multiple of model.experts ({experts})")

    def __init__(self, settings: Settings, sizes: Sizes) -> None:
        super().__init__()
        width = sizes.width
        self.settings = settings
        self.experts = Experts(sizes.experts, width, sizes.hidden, sizes.dropout)
        self.router = SMoE(SMoE.Settings(top_k=settings.top_k, balance=settings.balance), sizes)
        self.quantizer = VectorQuantizer(settings.codes, width, settings.dead_share)
        if settings.input == "residual":
            self.code_embedding_CD = nn.Parameter(torch.zeros(settings.codes, width))
        if settings.combine == "gate":
            self.gate = nn.Linear(width, 2)

    def forward(self, x_ND: Tensor, mode: Mode, id_N: Tensor | None = None) -> LayerOutput:
        if mode == "router":
            routing = self.router(x_ND, id_N)
            y_NKD = apply_experts(self.experts, x_ND, routing.index_NK)
            return LayerOutput(combine(y_NKD, routing.weight_NK), routing.losses, routing.index_NK, None)
        if mode == "both" and self.training and torch.rand(()) < self.settings.drop_routed:
            mode = "discrete"
        quantized = self.quantizer(x_ND)
        losses = {
            "codebook": Loss(quantized.codebook_loss, self.settings.beta),
            "commitment": Loss(quantized.commitment_loss, self.settings.beta * self.settings.commitment),
        }
        expert_N1 = (quantized.code_N % self.experts.count)[:, None]
        discrete_ND = self._discrete_input(x_ND, quantized.code_N, quantized.value_ND)
        if mode == "discrete":
            y_ND = apply_experts(self.experts, discrete_ND, expert_N1).squeeze(1)
            return LayerOutput(y_ND, losses, expert_N1, quantized.code_N)
        routing = self.router(x_ND, id_N)
        index_NK = torch.cat([routing.index_NK, expert_N1], 1)
        x_NKD = torch.cat([x_ND[:, None].expand(-1, self.settings.top_k, -1), discrete_ND[:, None]], 1)
        y_NKD = apply_experts(self.experts, x_NKD, index_NK)
        y_ND = self._combine(x_ND, combine(y_NKD[:, :-1], routing.weight_NK), y_NKD[:, -1])
        return LayerOutput(y_ND, routing.losses | losses, index_NK, quantized.code_N)

    def assignment_parameters(self) -> list[nn.Parameter]:
        """What decides the assignment at inference: the codebook, and the embedding that tells an expert the code."""
        embedding = [self.code_embedding_CD] if self.settings.input == "residual" else []
        return [self.quantizer.codebook_CD, *embedding]

    def freeze_assignment(self) -> None:
        """Fine-tuning and inference keep the codebook as it is."""
        self.quantizer.freeze()

    def _discrete_input(self, x_ND: Tensor, code_N: Tensor, value_ND: Tensor) -> Tensor:
        if self.settings.input == "code":
            return x_ND + (value_ND - x_ND).detach()
        if self.settings.input == "blend":
            return (1 - self.settings.blend) * x_ND + self.settings.blend * (value_ND - x_ND).detach()
        return x_ND + nn.functional.embedding(code_N, self.code_embedding_CD)

    def _combine(self, x_ND: Tensor, routed_ND: Tensor, discrete_ND: Tensor) -> Tensor:
        if self.settings.combine == "sum":
            return routed_ND + discrete_ND
        gate_N2 = self.gate(x_ND).softmax(-1)
        return gate_N2[:, :1] * routed_ND + gate_N2[:, 1:] * discrete_ND


# Methods that are more than a router.
LAYERS = {"vqmoe": VQMoE, "vqmoe_released": VQMoEReleased, "dense": Dense}
SETTINGS = {name: made.Settings for name, made in (LAYERS | ROUTERS).items()}


def build_layer(method: str, settings: Settings, sizes: Sizes) -> nn.Module:
    """The layer of a method by its name under `methods` in params.yaml."""
    if method in LAYERS:
        return LAYERS[method](settings, sizes)
    experts = Experts(sizes.experts, sizes.width, sizes.hidden, sizes.dropout)
    return SparseMoE(ROUTERS[method](settings, sizes), experts)
