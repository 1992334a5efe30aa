"""Soft MoE: experts read mixes of a sequence's tokens, and each token gets a mix of their answers (Puigcerver et al. 2023).

Shapes: N tokens, B sequences of T tokens, D width, E experts, S slots per expert, M = E S slots.
"""

from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from pipeline.moe.experts import Experts
from pipeline.moe.routers.base import LayerOutput, Mode, Settings, Sizes, exactly


class SoftMoE(nn.Module):
    """scores = scale cos(x, slot): their softmax over tokens mixes what a slot reads, that over slots what a token gets.

    No balance loss is needed. For measures, a token's expert is the one whose slots weigh most in what it gets.
    """

    modes: tuple[Mode, ...] = ("router",)

    class Settings(Settings):
        slots: Annotated[int, Field(gt=0)]

        @property
        def causal(self) -> bool:
            return False

    def __init__(self, settings: Settings, sizes: Sizes) -> None:
        super().__init__()
        self.slots = settings.slots
        self.experts = Experts(sizes.experts, sizes.width, sizes.hidden, sizes.dropout)
        self.slot_MD = nn.Parameter(torch.randn(sizes.experts * settings.slots, sizes.width) / sizes.width**0.5)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x_ND: Tensor, mode: Mode, id_N: Tensor | None = None, length: int | None = None) -> LayerOutput:
        assert mode == "router" and length is not None, (mode, length)
        x_BTD, experts = x_ND.unflatten(0, (-1, length)), self.experts.count
        with exactly(x_ND):
            scores_BTM = F.normalize(x_BTD, dim=-1) @ (self.scale * F.normalize(self.slot_MD, dim=-1)).T
        given_BMD = scores_BTM.softmax(1).transpose(1, 2) @ x_BTD
        # The experts want their rows one expert after another.
        given_EBSD = given_BMD.unflatten(1, (experts, -1)).transpose(0, 1)
        answer_EBSD = self.experts(given_EBSD.flatten(1, 2)).view_as(given_EBSD)
        weight_BTM = scores_BTM.softmax(2)
        y_BTD = weight_BTM @ answer_EBSD.transpose(0, 1).flatten(1, 2)
        weight_NE = weight_BTM.detach().flatten(0, 1).unflatten(1, (experts, -1)).sum(-1)
        return LayerOutput(y_BTD.flatten(0, 1), {}, weight_NE.argmax(1, keepdim=True), None, scores=weight_NE)

    def assignment_parameters(self) -> list[nn.Parameter]:
        """What decides the mixes: the slots and the scale."""
        return [self.slot_MD, self.scale]

    def freeze_assignment(self) -> None:
        """Nothing to freeze: as a learned router, the slots go on learning in fine-tuning."""
