"""Decoder-only Transformer whose feed-forward layers are mixtures of experts.

Shapes: B sequences, T positions, S positions with those remembered, D width, H heads, F head width, V vocabulary, N tokens.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.config import TextModel
from pipeline.models.backbone import Attention, Backbone, Block, Hidden
from pipeline.models.relative import RelativeAttention, RelativePositions
from pipeline.moe.layer import Mode, build_layer
from pipeline.moe.routers.base import Settings, Sizes


class Transformer(Backbone):
    """Causal attention, inputs scaled by sqrt(D); rotary, learned or relative positions, the last with memory.

    Input and output embeddings are tied. With cutoffs the output is an adaptive softmax (Grave et al. 2017) with weights of
    its own: its rare tokens have narrow ones, D / 4 and less, while the embeddings of all tokens are D wide.
    """

    def __init__(self, model: TextModel, method: str, settings: Settings, vocabulary: int) -> None:
        super().__init__(model.width)
        self.context, self.memory = model.context, model.memory
        self.evaluate_context, self.evaluate_memory = model.evaluate_context, model.evaluate_memory
        self.embedding = nn.Embedding(vocabulary, model.width)
        self.positions = nn.Embedding(model.context, model.width) if model.positions == "learned" else None
        self.rotary = Rotary(model.head_width, model.context) if model.positions == "rotary" else None
        self.relative = None
        if model.positions == "relative":
            self.relative = RelativePositions(model.width, model.heads, model.head_width, model.dropout)
        self.dropout = nn.Dropout(model.dropout)
        attention = RelativeAttention if model.positions == "relative" else Attention
        sizes = Sizes(model.width, model.experts, model.expert_width, vocabulary, model.dropout)
        self.blocks = nn.ModuleList(
            Block(
                model.width,
                attention(model.width, model.heads, model.head_width),
                build_layer(method, settings, sizes),
                model.dropout,
                pre=model.norm == "pre",
            )
            for _ in range(model.layers)
        )
        self.norm = nn.LayerNorm(model.width) if model.norm == "pre" else nn.Identity()
        self.adaptive = None
        if model.cutoffs:
            self.adaptive = nn.AdaptiveLogSoftmaxWithLoss(model.width, vocabulary, model.cutoffs, div_value=4)
        nn.init.normal_(self.embedding.weight, std=0.02)
        if self.positions is not None:
            nn.init.normal_(self.positions.weight, std=0.02)

    def forward(
        self, tokens_BT: Tensor, mode: Mode, valid_BT: Tensor | None = None, memory: list[Tensor] | None = None
    ) -> Hidden:
        """Hidden states; positions where `valid_BT` is false never reach an expert.

        `memory` is that of the segment before (`Hidden.memory`). With rotary or learned positions there is none, and a
        segment has at most `context` tokens.
        """
        assert memory is None or self.relative is not None
        tokens_BT = tokens_BT.to(self.device)
        valid_BT = None if valid_BT is None else valid_BT.to(self.device)
        length = tokens_BT.shape[1]
        x_BTD = self.embedding(tokens_BT) * math.sqrt(self.width)
        if self.positions is not None:
            x_BTD = x_BTD + self.positions.weight[:length]
        x_BTD = self.dropout(x_BTD)
        places = self.rotary
        if self.relative is not None:
            places = self.relative(length, length if memory is None else length + memory[0].shape[1])
        layers, seen = [], []
        for index, block in enumerate(self.blocks):
            seen_BSD = x_BTD if memory is None else torch.cat([memory[index], x_BTD], 1)
            seen.append(seen_BSD.detach())
            x_BTD, output = block(x_BTD, seen_BSD, places, tokens_BT, mode, valid_BT)
            layers.append(output)
        return Hidden(self.norm(x_BTD), layers, seen)

    def nats(self, state: Tensor, target: Tensor) -> Tensor:
        """Negative log-likelihood (...) of each target (...) from its hidden state (..., D), zero where the target is -1."""
        target = target.to(state.device)
        if self.adaptive is None:
            logits_NV = F.linear(state.flatten(0, -2), self.embedding.weight)
            return F.cross_entropy(logits_NV, target.flatten(), ignore_index=-1, reduction="none").view_as(target)
        valid = target >= 0
        return state.new_zeros(target.shape).masked_scatter(valid, -self.adaptive(state[valid], target[valid]).output)

    def next_token(self, state_ND: Tensor) -> Tensor:
        """Log-probabilities (N, V) of all tokens to come next, from the hidden states of those before."""
        if self.adaptive is not None:
            return self.adaptive.log_prob(state_ND)
        return F.linear(state_ND, self.embedding.weight).float().log_softmax(-1)


class Rotary(nn.Module):
    """Rotary positions (Su et al. 2021): queries and keys turned by angles that grow with the position.

    Their products then depend on distances only, which a small model learns from far less text than from absolute
    positions. Shapes: A angles, half as many as F.
    """

    def __init__(self, head_width: int, context: int) -> None:
        super().__init__()
        frequency = 10000.0 ** (-torch.arange(0, head_width, 2) / head_width)
        angle_TA = torch.arange(context)[:, None] * frequency
        # As real numbers, since to move a module to another type drops the imaginary parts of its complex buffers.
        self.register_buffer("turn_TA2", torch.stack([angle_TA.cos(), angle_TA.sin()], -1), persistent=False)

    def forward(self, x_BTHF: Tensor) -> Tensor:
        # Neighbours as one complex number: one pass over x, where products with sines and cosines would be eight.
        x_BTHA = torch.view_as_complex(x_BTHF.float().unflatten(-1, (-1, 2)))
        turn_TA = torch.view_as_complex(self.turn_TA2[: x_BTHF.shape[1]])
        return torch.view_as_real(x_BTHA * turn_TA[:, None]).flatten(-2).type_as(x_BTHF)
