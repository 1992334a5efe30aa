"""What routers and layers are made from and what they answer, and what a method's settings share.

Shapes: N tokens, D width, E experts, K experts per token, C codes.
"""

from collections.abc import Sequence
from typing import ClassVar, Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

# How a layer is used: `both` paths of VQMoE, its `discrete` path alone, a `router` with few experts per token (or few mixes of
# tokens per expert), or `dense`: all experts (or the one there is). Of its `modes`, a layer pre-trains in the first; after that
# it is used in the second, or in the one there is; others are ablations.
Mode = Literal["both", "router", "discrete", "dense"]


class Loss(NamedTuple):
    """An auxiliary loss: its raw value (scalar) and the weight it has in the training loss."""

    value: Tensor
    weight: float


class Routing(NamedTuple):
    """A router's answer for N tokens: which K of E experts (-1: none), with what weight, from which scores.

    Without weights the router wants to see the experts' answers first, and `settle`.
    """

    index_NK: Tensor
    weight_NK: Tensor | None
    scores_NE: Tensor
    losses: dict[str, Loss]


class LayerOutput(NamedTuple):
    """Result y (N, D), auxiliary losses, the experts each token went to (N, K), -1 where an expert took no more.

    With a quantizer also each token's code (N,) and the quantization error: squared, mean over elements. `scores` are those
    that made the choice, without gradient, the highest the first choice: of the experts (N, E), or where a codebook chose, in
    mode `both` too, of the codes (N, C); None where nothing is scored.
    """

    y_ND: Tensor
    losses: dict[str, Loss]
    index_NK: Tensor
    code_N: Tensor | None
    code_error: Tensor | None = None
    scores: Tensor | None = None

    def cpu(self) -> "LayerOutput":
        """What measures are taken of, on the CPU: the choice, the codes and the scores."""
        kept = {name: value.cpu() for name, value in self._asdict().items() if isinstance(value, Tensor) and name != "y_ND"}
        return self._replace(**kept)


class Sizes(NamedTuple):
    """What a layer is built for: model width, number of experts and their hidden width, token ids, activation dropout.

    Where tokens have no ids, as patches of an image, their number is 0.
    """

    width: int
    experts: int
    hidden: int
    vocabulary: int
    dropout: float


class Settings(BaseModel):
    """Base of a method's section in params.yaml: frozen, typed, no unknown key."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    needs_ids: ClassVar[bool] = False  # whether tokens are routed by their ids, which those of an image do not have

    @property
    def causal(self) -> bool:
        """Whether what a token gets depends on no other token of the batch, as when a text's next tokens are predicted."""
        return True

    def chance(self, layers: int) -> float:
        """What a training step of so many layers does by chance (`moe.chance`), on average: from 0, none of it, to 1, all."""
        return 0.0

    def check(self, experts: int) -> None:
        """Raise ValueError if the settings cannot work with this many experts."""
        top_k = getattr(self, "top_k", 1)
        if top_k > experts:
            raise ValueError(f"top_k is {top_k}: at most model.experts ({experts})")


def exactly(x_ND: Tensor) -> torch.autocast:
    """Within this, choices among experts and codes are made in the precision of x even where experts compute in bfloat16."""
    return torch.autocast(x_ND.device.type, enabled=False)


class Router(nn.Module):
    """Base of all routers; built as `Router(settings, sizes)`."""

    modes: tuple[Mode, ...] = ("router",)

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.settings = settings

    def forward(self, x_ND: Tensor, id_N: Tensor | None) -> Routing:
        """Route tokens; `id_N` are the ids of the input tokens they stem from, None where there are none."""
        raise NotImplementedError

    def settle(self, routing: Routing, y_NKD: Tensor) -> tuple[Routing, Tensor]:
        """Last word of a router that gave no weights, on the experts' answers; both come back with the experts that count."""
        raise NotImplementedError

    @staticmethod
    def begin_step(routers: Sequence["Router"], done: float) -> None:
        """Called before every step of pre-training with the routers of all layers and the share of the steps done."""

    def assignment_parameters(self) -> list[nn.Parameter]:
        """The parameters that decide who goes where and still learn."""
        return list(self.parameters())


def top_k(scores_NE: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Indices (N, K) of the k largest scores, the softmax over those (N, K), and the softmax over all (N, E)."""
    probs_NE = scores_NE.softmax(-1)
    top_NK, index_NK = scores_NE.topk(k, dim=-1)
    if k > 1:
        return index_NK, top_NK.softmax(-1), probs_NE
    # A softmax over one score is the constant 1 and would leave the router without a gradient: keep the value 1, and
    # let the gradient be that of the chosen expert's probability.
    chosen_N1 = probs_NE.gather(1, index_NK)
    return index_NK, chosen_N1 + (1 - chosen_N1).detach(), probs_NE
