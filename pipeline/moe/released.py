"""VQMoE with the choices of its released code, to compare published behaviour with the corrected layer (METHOD section 2).

Shapes: N tokens, D width, E experts, C codes.
"""

from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from pipeline.moe.dispatch import apply_experts
from pipeline.moe.experts import Experts
from pipeline.moe.losses import codebook_loss, commitment_loss
from pipeline.moe.quantizers.kmeans import distances
from pipeline.moe.routers.base import LayerOutput, Loss, Mode, Router, Routing, Settings, Sizes, exactly


class VQMoEReleased(nn.Module):
    """y = g_c FFN_e(x) + g_d LN(FFN_j(LN((1 - a) x + a sg(v - x)))), with a softmax gate g, modes as in VQMoE.

    ReLU experts, dropout inside them on the routed path only, one LayerNorm for all three places (the block's too), no
    balance loss, a codebook that starts at random and is never re-seeded.
    """

    modes: tuple[Mode, ...] = ("both", "discrete", "router")

    class Settings(Settings):
        codes: Annotated[int, Field(gt=0)]
        blend: Annotated[float, Field(ge=0, le=1)]
        beta: Annotated[float, Field(ge=0)]
        commitment: Annotated[float, Field(ge=0)]

        def check(self, experts: int) -> None:
            super().check(experts)
            if self.codes % experts:
                raise ValueError(f"codes is {self.codes}: must be a multiple of model.experts ({experts})")

    def __init__(self, settings: Settings, sizes: Sizes) -> None:
        super().__init__()
        self.settings = settings
        self.experts = Experts(sizes.experts, sizes.width, sizes.hidden, sizes.dropout, "relu")
        self.router = ConstantWeight(settings, sizes)
        self.quantizer = PlainCodebook(settings.codes, sizes.width)
        self.norm = nn.LayerNorm(sizes.width)
        self.gate = nn.Linear(sizes.width, 2)
        for weight in (self.experts.w1_EDH, self.experts.w2_EHD, self.quantizer.codebook_CD, self.gate.weight):
            nn.init.normal_(weight, std=0.02)
        nn.init.zeros_(self.gate.bias)

    def forward(self, x_ND: Tensor, mode: Mode, id_N: Tensor | None = None, length: int | None = None) -> LayerOutput:
        if mode == "router":
            routing, y_ND = self._routed(x_ND, id_N)
            return LayerOutput(y_ND, {}, routing.index_NK, None, scores=routing.scores_NE.detach())
        with exactly(x_ND):
            scores_NC = self.quantizer(x_ND)
        code_N = scores_NC.argmax(1)
        value_ND = F.embedding(code_N, self.quantizer.codebook_CD)
        codebook = codebook_loss(x_ND=x_ND, value_ND=value_ND)
        losses = {
            "codebook": Loss(codebook, self.settings.beta),
            "commitment": Loss(commitment_loss(x_ND=x_ND, value_ND=value_ND), self.settings.beta * self.settings.commitment),
        }
        coded = (code_N, codebook.detach(), scores_NC)
        expert_N1 = (code_N % self.experts.count)[:, None]
        given_ND = (1 - self.settings.blend) * x_ND + self.settings.blend * (value_ND - x_ND).detach()
        discrete_ND = self.norm(apply_experts(self.experts, self.norm(given_ND), expert_N1, drop=False).squeeze(1))
        if mode == "discrete":
            return LayerOutput(discrete_ND, losses, expert_N1, *coded)
        routing, routed_ND = self._routed(x_ND, id_N)
        with exactly(x_ND):
            gate_N2 = self.gate(x_ND).softmax(-1)
        y_ND = gate_N2[:, :1] * routed_ND + gate_N2[:, 1:] * discrete_ND
        return LayerOutput(y_ND, losses, torch.cat([routing.index_NK, expert_N1], 1), *coded)

    def assignment_parameters(self) -> list[nn.Parameter]:
        """What decides the assignment at inference: the codebook."""
        return [self.quantizer.codebook_CD]

    def freeze_assignment(self) -> None:
        """Fine-tuning and inference keep the codebook as it is."""
        self.quantizer.codebook_CD.requires_grad_(False)

    def _routed(self, x_ND: Tensor, id_N: Tensor | None) -> tuple[Routing, Tensor]:
        with exactly(x_ND):
            routing = self.router(x_ND, id_N)
        return routing, apply_experts(self.experts, x_ND, routing.index_NK, routing.weight_NK)


class ConstantWeight(Router):
    """scores = x . e / ||e||, the largest, weighted by a softmax over this one score.

    That is always 1: the embeddings get no gradient and stay as drawn.
    """

    def __init__(self, settings: Settings, sizes: Sizes) -> None:
        super().__init__(settings)
        self.expert_ED = nn.Parameter(nn.init.orthogonal_(torch.empty(sizes.experts, sizes.width), gain=0.32))

    def forward(self, x_ND: Tensor, id_N: Tensor | None) -> Routing:
        scores_NE = x_ND @ F.normalize(self.expert_ED, dim=-1).T
        top_N1, index_N1 = scores_NE.max(-1, keepdim=True)
        return Routing(index_N1, top_N1.softmax(-1), scores_NE, {})


class PlainCodebook(nn.Module):
    """j(x) = argmin_j ||x - v_j||^2 over a codebook V (C, D) that nothing but its loss moves."""

    def __init__(self, codes: int, width: int) -> None:
        super().__init__()
        self.codes = codes
        self.codebook_CD = nn.Parameter(torch.empty(codes, width))

    @torch.no_grad()
    def forward(self, x_ND: Tensor) -> Tensor:
        """Scores (N, C) of the codes, the highest that of the nearest; ties go to the lower code."""
        return -distances(x_ND, self.codebook_CD)

    @torch.no_grad()
    def repair(self, x_ND: Tensor) -> None:
        """Move the codes that none of these tokens uses onto random ones of them (warm-up; the release has none)."""
        idle_C = torch.bincount(self(x_ND).argmax(1), minlength=self.codes) == 0
        self.codebook_CD[idle_C] = x_ND[torch.randint(len(x_ND), (int(idle_C.sum()),))]
