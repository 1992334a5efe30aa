"""Decoder-only Transformer whose feed-forward layers are mixtures of experts.

Shapes: B sequences, T positions, S positions with those remembered, D width, H heads, F head width, V vocabulary, N = real
(not padded) tokens of the batch.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.config import Model
from pipeline.models.relative import Relative, RelativeAttention, RelativePositions
from pipeline.moe.layer import LayerOutput, Mode, build_layer
from pipeline.moe.routers.base import Loss, Settings, Sizes


class Hidden(NamedTuple):
    """Last hidden states (B, T, D), what each mixture layer answered, and what each block's attention saw (B, S, D)."""

    state_BTD: Tensor
    layers: list[LayerOutput]
    seen: list[Tensor]

    def memory(self, length: int) -> list[Tensor] | None:
        """The last `length` states that each block saw, without gradient, for the segment that follows; None for no length."""
        return [seen_BSD[:, -length:] for seen_BSD in self.seen] if length else None

    def auxiliary(self) -> Tensor:
        """Weighted sum of all layers' auxiliary losses; zero where there are none."""
        terms: list[Loss] = [loss for layer in self.layers for loss in layer.losses.values()]
        if not terms:
            return self.state_BTD.new_zeros(())
        return torch.stack([loss.weight * loss.value for loss in terms]).sum()

    def losses(self) -> dict[str, Tensor]:
        """Raw auxiliary losses by name, mean over layers."""
        names = {name for layer in self.layers for name in layer.losses}
        return {
            name: torch.stack([layer.losses[name].value for layer in self.layers if name in layer.losses]).mean()
            for name in sorted(names)
        }


class Transformer(nn.Module):
    """Causal attention, inputs scaled by sqrt(D); rotary, learned or relative positions, the last with memory.

    Input and output embeddings are tied. With cutoffs the output is an adaptive softmax (Grave et al. 2017) with weights of
    its own: its rare tokens have narrow ones, D / 4 and less, while the embeddings of all tokens are D wide.
    """

    def __init__(self, model: Model, method: str, settings: Settings, vocabulary: int) -> None:
        super().__init__()
        self.context, self.memory = model.context, model.memory
        self.evaluate_context, self.evaluate_memory = model.evaluate_context, model.evaluate_memory
        self.embedding = nn.Embedding(vocabulary, model.width)
        self.positions = nn.Embedding(model.context, model.width) if model.positions == "learned" else None
        self.rotary = Rotary(model.head_width, model.context) if model.positions == "rotary" else None
        self.relative = None
        if model.positions == "relative":
            self.relative = RelativePositions(model.width, model.heads, model.head_width, model.dropout)
        self.dropout = nn.Dropout(model.dropout)
        self.blocks = nn.ModuleList(Block(model, method, settings, vocabulary) for _ in range(model.layers))
        self.norm = nn.LayerNorm(model.width) if model.norm == "pre" else nn.Identity()
        self.adaptive = None
        if model.cutoffs:
            self.adaptive = nn.AdaptiveLogSoftmaxWithLoss(model.width, vocabulary, model.cutoffs, div_value=4)
        nn.init.normal_(self.embedding.weight, std=0.02)
        if self.positions is not None:
            nn.init.normal_(self.positions.weight, std=0.02)

    @property
    def moe_layers(self) -> list[nn.Module]:
        """The mixture layers, first block first."""
        return [block.moe for block in self.blocks]

    @property
    def modes(self) -> tuple[Mode, ...]:
        return self.moe_layers[0].modes

    @property
    def train_mode(self) -> Mode:
        """The mode of pre-training."""
        return self.modes[0]

    @property
    def infer_mode(self) -> Mode:
        """The mode of everything after pre-training."""
        return self.modes[:2][-1]

    def begin_step(self, done: float) -> None:
        """Tell the routers that a step of pre-training begins, with this share of the steps done (0 to 1)."""
        routers = [layer.router for layer in self.moe_layers if hasattr(layer, "router")]
        if routers:
            type(routers[0]).begin_step(routers, done)

    def forward(
        self, tokens_BT: Tensor, mode: Mode, valid_BT: Tensor | None = None, memory: list[Tensor] | None = None
    ) -> Hidden:
        """Hidden states; positions where `valid_BT` is false never reach an expert.

        `memory` is that of the segment before (`Hidden.memory`). With rotary or learned positions there is none, and a
        segment has at most `context` tokens.
        """
        assert memory is None or self.relative is not None
        length = tokens_BT.shape[1]
        x_BTD = self.embedding(tokens_BT) * math.sqrt(self.embedding.embedding_dim)
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
        if self.adaptive is None:
            logits_NV = F.linear(state.flatten(0, -2), self.embedding.weight)
            return F.cross_entropy(logits_NV, target.flatten(), ignore_index=-1, reduction="none").view_as(target)
        valid = target >= 0
        return state.new_zeros(target.shape).masked_scatter(valid, -self.adaptive(state[valid], target[valid]).output)


class Block(nn.Module):
    """Causal self-attention, then the mixture of experts, each with a residual and a normalisation before or after."""

    def __init__(self, model: Model, method: str, settings: Settings, vocabulary: int) -> None:
        super().__init__()
        self.pre = model.norm == "pre"
        self.attention_norm = nn.LayerNorm(model.width)
        attention = RelativeAttention if model.positions == "relative" else Attention
        self.attention = attention(model.width, model.heads, model.head_width)
        moe = build_layer(method, settings, Sizes(model.width, model.experts, model.expert_width, vocabulary, model.dropout))
        # A layer with a normalisation of its own shares it with the block, and is the one that registers it.
        self.moe_norm = None if hasattr(moe, "norm") else nn.LayerNorm(model.width)
        self.moe = moe
        self.dropout = nn.Dropout(model.dropout)

    def forward(
        self,
        x_BTD: Tensor,
        seen_BSD: Tensor,
        places: "Relative | Rotary | None",
        tokens_BT: Tensor,
        mode: Mode,
        valid_BT: Tensor | None,
    ) -> tuple[Tensor, LayerOutput]:
        """`seen` is the memory, if there is one, and then x."""
        moe_norm = self.moe_norm or self.moe.norm
        if self.pre:
            x_BTD = x_BTD + self.dropout(self.attention(self.attention_norm(seen_BSD), places))
            y_BTD, output = self._mix(moe_norm(x_BTD), tokens_BT, mode, valid_BT)
            return x_BTD + y_BTD, output
        x_BTD = self.attention_norm(x_BTD + self.dropout(self.attention(seen_BSD, places)))
        y_BTD, output = self._mix(x_BTD, tokens_BT, mode, valid_BT)
        return moe_norm(x_BTD + y_BTD), output

    def _mix(self, x_BTD: Tensor, tokens_BT: Tensor, mode: Mode, valid_BT: Tensor | None) -> tuple[Tensor, LayerOutput]:
        if valid_BT is None:
            output = self.moe(x_BTD.flatten(0, 1), mode, tokens_BT.flatten())
            return self.dropout(output.y_ND.view_as(x_BTD)), output
        output = self.moe(x_BTD[valid_BT], mode, tokens_BT[valid_BT])
        return self.dropout(torch.zeros_like(x_BTD).masked_scatter(valid_BT[..., None], output.y_ND)), output


class Attention(nn.Module):
    """Causal attention whose positions are rotary, or already in its input."""

    def __init__(self, width: int, heads: int, head_width: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * heads * head_width)
        self.project = nn.Linear(heads * head_width, width)

    def forward(self, x_BTD: Tensor, rotary: "Rotary | None") -> Tensor:
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x_BTD).chunk(3, dim=-1))
        if rotary is not None:
            q, k = rotary(q), rotary(k)
        return self.project(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class Rotary(nn.Module):
    """Rotary positions (Su et al. 2021): queries and keys turned by angles that grow with the position.

    Their products then depend on distances only, which a small model learns from far less text than from absolute
    positions.
    """

    def __init__(self, head_width: int, context: int) -> None:
        super().__init__()
        frequency = 10000.0 ** (-torch.arange(0, head_width, 2) / head_width)
        angle_TF = torch.arange(context)[:, None] * frequency
        self.register_buffer("cos_TF", angle_TF.cos(), persistent=False)
        self.register_buffer("sin_TF", angle_TF.sin(), persistent=False)

    def forward(self, x_BHTF: Tensor) -> Tensor:
        length = x_BHTF.shape[-2]
        cos_TF, sin_TF = self.cos_TF[:length], self.sin_TF[:length]
        first, second = x_BHTF.chunk(2, dim=-1)
        return torch.cat([first * cos_TF - second * sin_TF, first * sin_TF + second * cos_TF], dim=-1)
