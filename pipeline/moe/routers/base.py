"""What every router returns, and what its settings share."""

from typing import NamedTuple

from pydantic import BaseModel, ConfigDict
from torch import Tensor


class Loss(NamedTuple):
    """An auxiliary loss: its raw value (scalar) and the weight it has in the training loss."""

    value: Tensor
    weight: float


class Routing(NamedTuple):
    """A router's answer for N tokens: which K of E experts, with what weight, from which scores."""

    index_NK: Tensor
    weight_NK: Tensor
    scores_NE: Tensor
    losses: dict[str, Loss]


class Settings(BaseModel):
    """Base of a method's section in params.yaml: frozen, typed, no unknown key."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    def check(self, experts: int) -> None:
        """Raise ValueError if the settings cannot work with this many experts."""
        top_k = getattr(self, "top_k", 1)
        if top_k > experts:
            raise ValueError(f"top_k is {top_k}: at most model.experts ({experts})")
