"""Mixture-of-experts layers: experts, dispatch and a router or a quantizer put together.

Shapes: N tokens, D width, E experts, K assignments per token, C codes.
"""

from typing import Annotated, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from pipeline.moe.dispatch import apply_experts
from pipeline.moe.experts import Experts
from pipeline.moe.quantizers import QUANTIZERS
from pipeline.moe.quantizers.base import Quantized
from pipeline.moe.routers import ROUTERS
from pipeline.moe.routers.base import Loss, Settings
from pipeline.moe.routers.smoe import SMoE

Mode = Literal["both", "router", "discrete"]


class LayerOutput(NamedTuple):
    """Result y (N, D), auxiliary losses, the experts each token went to (N, K).

    With a quantizer also each token's code (N,) and the quantization error: squared, mean over elements.
    """

    y_ND: Tensor
    losses: dict[str, Loss]
    index_NK: Tensor
    code_N: Tensor | None
    code_error: Tensor | None = None


class SparseMoE(nn.Module):
    """y = sum_k w_k FFN_k(x) over the experts a router chose. Knows the one mode `router`."""

    train_mode: Mode = "router"
    infer_mode: Mode = "router"

    def __init__(self, router: nn.Module, experts: Experts) -> None:
        super().__init__()
        self.router, self.experts = router, experts

    def forward(self, x_ND: Tensor, mode: Mode) -> LayerOutput:
        assert mode == "router", mode
        return _routed(self.router, self.experts, x_ND)

    def assignment_parameters(self) -> list[nn.Parameter]:
        """What decides the assignment: the router."""
        return list(self.router.parameters())

    def freeze_assignment(self) -> None:
        """Nothing to freeze: a learned router goes on learning in fine-tuning."""


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
        quantizer: Literal[*QUANTIZERS]
        codes: Annotated[int, Field(gt=0)]
        code_width: Annotated[int, Field(gt=0)]
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
            if self.quantizer == "fsq" and self.codes == 1:
                raise ValueError("codes is 1: at least 2 with quantizer fsq")

    def __init__(self, settings: Settings, width: int, experts: Experts) -> None:
        super().__init__()
        self.settings, self.experts = settings, experts
        self.router = SMoE(SMoE.Settings(top_k=settings.top_k, balance=settings.balance), width, experts.count)
        self.quantizer = QUANTIZERS[settings.quantizer](settings, width)
        if settings.input == "residual" and not self.quantizer.embeds:
            self.code_embedding_CD = nn.Parameter(torch.zeros(settings.codes, width))
        if settings.combine == "gate":
            self.gate = nn.Linear(width, 2)

    def forward(self, x_ND: Tensor, mode: Mode) -> LayerOutput:
        if mode == "router":
            return _routed(self.router, self.experts, x_ND)
        if mode == "both" and self.training and torch.rand(()) < self.settings.drop_routed:
            mode = "discrete"
        quantized = self.quantizer(x_ND)
        weights = {"codebook": self.settings.beta, "commitment": self.settings.beta * self.settings.commitment}
        losses = {name: Loss(value, weights[name]) for name, value in quantized.losses.items()}
        expert_N1 = (quantized.code_N % self.experts.count)[:, None]
        discrete_ND = self._discrete_input(x_ND, quantized)
        if mode == "discrete":
            y_ND = _weighted(apply_experts(self.experts, discrete_ND, expert_N1).squeeze(1), quantized)
            return LayerOutput(y_ND, losses, expert_N1, quantized.code_N, quantized.error)
        routing = self.router(x_ND)
        index_NK = torch.cat([routing.index_NK, expert_N1], 1)
        x_NKD = torch.cat([x_ND[:, None].expand(-1, self.settings.top_k, -1), discrete_ND[:, None]], 1)
        y_NKD = apply_experts(self.experts, x_NKD, index_NK)
        routed_ND = (routing.weight_NK[..., None] * y_NKD[:, :-1]).sum(1)
        y_ND = self._combine(x_ND, routed_ND, _weighted(y_NKD[:, -1], quantized))
        return LayerOutput(y_ND, routing.losses | losses, index_NK, quantized.code_N, quantized.error)

    def assignment_parameters(self) -> list[nn.Parameter]:
        """What decides the assignment at inference: the quantizer, and the embedding that tells an expert the code."""
        embedding = [self.code_embedding_CD] if hasattr(self, "code_embedding_CD") else []
        return [*self.quantizer.parameters(), *embedding]

    def freeze_assignment(self) -> None:
        """Fine-tuning and inference keep the codes as they are."""
        self.quantizer.freeze()

    def _discrete_input(self, x_ND: Tensor, quantized: Quantized) -> Tensor:
        if self.settings.input == "code":
            return x_ND + (quantized.value_ND - x_ND).detach()
        if self.settings.input == "blend":
            return (1 - self.settings.blend) * x_ND + self.settings.blend * (quantized.value_ND - x_ND).detach()
        if quantized.embedding_ND is not None:
            return x_ND + quantized.embedding_ND
        return x_ND + nn.functional.embedding(quantized.code_N, self.code_embedding_CD)

    def _combine(self, x_ND: Tensor, routed_ND: Tensor, discrete_ND: Tensor) -> Tensor:
        if self.settings.combine == "sum":
            return routed_ND + discrete_ND
        gate_N2 = self.gate(x_ND).softmax(-1)
        return gate_N2[:, :1] * routed_ND + gate_N2[:, 1:] * discrete_ND


def _weighted(discrete_ND: Tensor, quantized: Quantized) -> Tensor:
    return discrete_ND if quantized.weight_N1 is None else discrete_ND * quantized.weight_N1


def _routed(router: nn.Module, experts: Experts, x_ND: Tensor) -> LayerOutput:
    routing = router(x_ND)
    y_NKD = apply_experts(experts, x_ND, routing.index_NK)
    return LayerOutput((routing.weight_NK[..., None] * y_NKD).sum(1), routing.losses, routing.index_NK, None)


SETTINGS = {"vqmoe": VQMoE.Settings} | {name: router.Settings for name, router in ROUTERS.items()}


def build_layer(method: str, settings: Settings, *, width: int, experts: int, hidden: int, dropout: float) -> nn.Module:
    """The layer of a method by its name under `methods` in params.yaml."""
    feed_forward = Experts(experts, width, hidden, dropout)
    if method in ROUTERS:
        return SparseMoE(ROUTERS[method](settings, width, experts), feed_forward)
    return VQMoE(settings, width, feed_forward)
