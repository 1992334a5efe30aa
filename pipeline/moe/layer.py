"""Mixture-of-experts layers: experts, dispatch and a router or a quantizer put together.

A layer is called with tokens, a mode, the tokens' ids if there are any, and the `length` of the sequences that they form, one
after another; None where lengths differ.

Shapes: N tokens, D width, E experts, K assignments per token, C codes.
"""

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from pipeline.moe.chance import happens
from pipeline.moe.dispatch import Shift, apply_experts, combine
from pipeline.moe.experts import Experts, FeedForward
from pipeline.moe.losses import balance_loss
from pipeline.moe.quantizers import QUANTIZERS
from pipeline.moe.quantizers.base import Quantized
from pipeline.moe.released import VQMoEReleased
from pipeline.moe.routers import ROUTERS
from pipeline.moe.routers.base import LayerOutput, Loss, Mode, Router, Routing, Settings, Sizes, exactly
from pipeline.moe.routers.smoe import SMoE
from pipeline.moe.softmoe import SoftMoE


class SparseMoE(nn.Module):
    """y = sum_k w_k FFN_k(x) over the experts a router chose, in the modes that the router knows."""

    def __init__(self, router: Router, experts: Experts) -> None:
        super().__init__()
        self.router, self.experts = router, experts
        self.modes = router.modes

    def forward(self, x_ND: Tensor, mode: Mode, id_N: Tensor | None = None, length: int | None = None) -> LayerOutput:
        assert mode in self.modes, mode
        route = self.router.dense if mode == "dense" else self.router
        with exactly(x_ND):
            routing = route(x_ND, id_N)
        if routing.weight_NK is None:
            routing, y_NKD = self.router.settle(routing, apply_experts(self.experts, x_ND, routing.index_NK))
            y_ND = combine(y_NKD, routing.weight_NK)
        else:
            y_ND = apply_experts(self.experts, x_ND, routing.index_NK, routing.weight_NK)
        return LayerOutput(y_ND, routing.losses, routing.index_NK, None, scores=routing.scores_NE.detach())

    def assignment_parameters(self) -> list[nn.Parameter]:
        """What decides the assignment and still learns: the router, or a part of it."""
        return self.router.assignment_parameters()

    def freeze_assignment(self) -> None:
        """Nothing to freeze: a learned router goes on learning in fine-tuning, a frozen one is frozen."""


class Dense(nn.Module):
    """y = FFN(x) with k times the hidden width of an expert: the active FLOPs of k experts, without a router."""

    modes: tuple[Mode, ...] = ("dense",)

    class Settings(Settings):
        top_k: Annotated[int, Field(gt=0)]

    def __init__(self, settings: Settings, sizes: Sizes) -> None:
        super().__init__()
        self.experts = FeedForward(sizes.width, settings.top_k * sizes.hidden, sizes.dropout)

    def forward(self, x_ND: Tensor, mode: Mode, id_N: Tensor | None = None, length: int | None = None) -> LayerOutput:
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

    With `combine: distances` the codebook decides for both paths: the discrete one takes the expert of the nearest code, the
    routed one the experts that are next in distance, and their outputs are weighted by a softmax over those distances. Then there
    is no router, and no mode `router`.
    """

    class Settings(Settings):
        top_k: Annotated[int, Field(gt=0)]
        balance: Annotated[float, Field(ge=0)]
        quantizer: Literal[*QUANTIZERS]
        codes: Annotated[int, Field(gt=0)]
        code_width: Annotated[int, Field(gt=0)]
        input: Literal["code", "blend", "residual"]
        blend: Annotated[float, Field(ge=0, le=1)]
        combine: Literal["distances", "gate", "sum"]
        drop_routed: Annotated[float, Field(ge=0, lt=1)]
        beta: Annotated[float, Field(ge=0)]
        commitment: Annotated[float, Field(ge=0)]
        dead_share: Annotated[float, Field(ge=0, lt=1)]

        def chance(self, layers: int) -> float:
            return self.drop_routed

        def check(self, experts: int) -> None:
            super().check(experts)
            if self.codes % experts:
                raise ValueError(f"codes is {self.codes}: must be a multiple of model.experts ({experts})")
            if self.quantizer == "fsq" and self.codes == 1:
                raise ValueError("codes is 1: at least 2 with quantizer fsq")
            if self.combine == "distances" and self.quantizer != "task":
                raise ValueError(f"quantizer is {self.quantizer}: must be task with combine distances")
            if self.combine == "distances" and self.top_k >= experts:
                raise ValueError(f"top_k is {self.top_k}: under model.experts ({experts}) with combine distances")

    def __init__(self, settings: Settings, sizes: Sizes) -> None:
        super().__init__()
        self.settings = settings
        self.experts = Experts(sizes.experts, sizes.width, sizes.hidden, sizes.dropout)
        self.modes: tuple[Mode, ...] = ("both", "discrete")
        if settings.combine != "distances":
            self.modes = ("both", "discrete", "router")
            self.router = SMoE(SMoE.Settings(top_k=settings.top_k, balance=settings.balance), sizes)
        self.quantizer = QUANTIZERS[settings.quantizer](settings, sizes.width)
        if settings.input == "residual" and not self.quantizer.embeds:
            self.code_embedding_CD = nn.Parameter(torch.zeros(settings.codes, sizes.width))
        if settings.combine == "gate":
            self.gate = nn.Linear(sizes.width, 2)

    def forward(self, x_ND: Tensor, mode: Mode, id_N: Tensor | None = None, length: int | None = None) -> LayerOutput:
        if mode == "router":
            with exactly(x_ND):
                routing = self.router(x_ND, id_N)
            y_ND = apply_experts(self.experts, x_ND, routing.index_NK, routing.weight_NK)
            return LayerOutput(y_ND, routing.losses, routing.index_NK, None, scores=routing.scores_NE.detach())
        if mode == "both" and self.training and happens(self.settings.drop_routed):
            mode = "discrete"
        with exactly(x_ND):
            quantized = self.quantizer(x_ND)
        coded = (quantized.code_N, quantized.error, None if quantized.scores_NC is None else quantized.scores_NC.detach())
        weights = {"codebook": self.settings.beta, "commitment": self.settings.beta * self.settings.commitment}
        losses = {name: Loss(value, weights[name]) for name, value in quantized.losses.items()}
        expert_N1 = (quantized.code_N % self.experts.count)[:, None]
        if mode == "discrete":
            index_NK, weight_NK = expert_N1, _one(quantized)
        else:
            with exactly(x_ND):
                routing, weight_NK = self._both(x_ND, id_N, quantized, expert_N1)
            index_NK, losses = torch.cat([routing.index_NK, expert_N1], 1), routing.losses | losses
        if hasattr(self, "code_embedding_CD"):
            y_ND = apply_experts(self.experts, x_ND, index_NK, weight_NK, shift=Shift(self.code_embedding_CD, quantized.code_N))
        else:
            routed_NKD = x_ND[:, None].expand(-1, index_NK.shape[1] - 1, -1)
            x_NKD = torch.cat([routed_NKD, self._discrete_input(x_ND, quantized)[:, None]], 1)
            y_ND = apply_experts(self.experts, x_NKD, index_NK, weight_NK)
        return LayerOutput(y_ND, losses, index_NK, *coded)

    def assignment_parameters(self) -> list[nn.Parameter]:
        """What decides the assignment at inference: the quantizer, and the embedding that tells an expert the code."""
        embedding = [self.code_embedding_CD] if hasattr(self, "code_embedding_CD") else []
        return [*self.quantizer.parameters(), *embedding]

    def freeze_assignment(self) -> None:
        """Fine-tuning and inference keep the codes as they are."""
        self.quantizer.freeze()

    def _discrete_input(self, x_ND: Tensor, quantized: Quantized) -> Tensor:
        if self.settings.input == "code":
            return x_ND + (quantized.value() - x_ND).detach()
        if self.settings.input == "blend":
            return (1 - self.settings.blend) * x_ND + self.settings.blend * (quantized.value() - x_ND).detach()
        return x_ND + quantized.embedding_ND

    def _both(self, x_ND: Tensor, id_N: Tensor | None, quantized: Quantized, expert_N1: Tensor) -> tuple[Routing, Tensor]:
        """The routed path's answer, and weights of its experts and, in the last place, of the discrete one."""
        if self.settings.combine == "distances":
            routing = self._next_in_distance(quantized, expert_N1)
            return routing, routing.weight_NK
        routing = self.router(x_ND, id_N)
        weight_NK = torch.cat([routing.weight_NK, _one(quantized)], 1)
        if self.settings.combine == "gate":
            gate_N2 = self.gate(x_ND).softmax(-1)
            weight_NK = weight_NK * torch.cat([gate_N2[:, :1].expand_as(routing.weight_NK), gate_N2[:, 1:]], 1)
        return routing, weight_NK

    def _next_in_distance(self, quantized: Quantized, expert_N1: Tensor) -> Routing:
        """The routed experts, and weights for these and, in the last place, for the discrete one.

        An expert is as near as the nearest of its codes.
        """
        score_NE = quantized.scores_NC.unflatten(1, (-1, self.experts.count)).amax(1)
        index_NK = score_NE.scatter(1, expert_N1, -torch.inf).topk(self.settings.top_k, dim=-1).indices
        all_NK = torch.cat([index_NK, expert_N1], 1)
        balance = balance_loss(probs_NE=score_NE.softmax(-1), index_NK=all_NK)
        weight_NK = score_NE.gather(1, all_NK).softmax(-1)
        return Routing(index_NK, weight_NK, score_NE, {"balance": Loss(balance, self.settings.balance)})


def _one(quantized: Quantized) -> Tensor:
    """The weight of the discrete expert, 1, with its gradient where the variant has one (N, 1)."""
    if quantized.weight_N1 is not None:
        return quantized.weight_N1
    return torch.ones_like(quantized.code_N[:, None], dtype=quantized.error.dtype)


# Methods that are more than a router.
LAYERS = {"vqmoe": VQMoE, "vqmoe_released": VQMoEReleased, "dense": Dense, "softmoe": SoftMoE}
SETTINGS = {name: made.Settings for name, made in (LAYERS | ROUTERS).items()}
SETTINGS["softmoe"] = SETTINGS.pop("softmoe")  # plots colour methods by their place here: new ones come last


def build_layer(method: str, settings: Settings, sizes: Sizes) -> nn.Module:
    """The layer of a method by its name under `methods` in params.yaml."""
    if method in LAYERS:
        return LAYERS[method](settings, sizes)
    experts = Experts(sizes.experts, sizes.width, sizes.hidden, sizes.dropout)
    return SparseMoE(ROUTERS[method](settings, sizes), experts)
