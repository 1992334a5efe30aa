"""What the Transformers of text and of images share: blocks of attention and feed-forward, some or all of these with experts.

Shapes: B sequences, T positions, S positions with those remembered, D width, N = real (not padded) tokens of the batch.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.moe.layer import LayerOutput, Mode
from pipeline.moe.routers.base import Loss


class Hidden(NamedTuple):
    """Last hidden states (B, T, D), what each mixture layer answered, and what the attention of a text's blocks saw (B, S, D)."""

    state_BTD: Tensor
    layers: list[LayerOutput]
    seen: list[Tensor]

    def memory(self, length: int) -> list[Tensor] | None:
        """The last `length` states that each block saw, without gradient, for the segment that follows; None for no length.

        Contiguous, so that products with it have the same bits where it was kept on disk in between.
        """
        return [seen_BSD[:, -length:].contiguous() for seen_BSD in self.seen] if length else None

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


class Backbone(nn.Module):
    """Base of both, which have `blocks`; width is that of the states."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    @property
    def expert_blocks(self) -> tuple[int, ...]:
        """The blocks that have a mixture layer."""
        return tuple(range(len(self.blocks)))

    @property
    def moe_layers(self) -> list[nn.Module]:
        """The mixture layers, first block first."""
        return [self.blocks[index].moe for index in self.expert_blocks]

    @property
    def device(self) -> torch.device:
        """Where the model is; a forward pass takes its inputs there."""
        return next(self.parameters()).device

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


class Block(nn.Module):
    """Self-attention, then the mixture of experts, each with a residual and a normalisation before or after.

    A `shared` expert answers every token, and its answer is added to that of the mixture (ViMoE, Han et al. 2024).
    """

    def __init__(
        self,
        width: int,
        attention: nn.Module,
        moe: nn.Module,
        dropout: float,
        *,
        pre: bool = True,
        shared: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.pre = pre
        self.attention_norm = nn.LayerNorm(width)
        self.attention = attention
        # A layer with a normalisation of its own shares it with the block, and is the one that registers it.
        self.moe_norm = None if hasattr(moe, "norm") else nn.LayerNorm(width)
        self.moe = moe
        self.shared = shared
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x_BTD: Tensor,
        seen_BSD: Tensor,
        places: object,
        tokens_BT: Tensor | None,
        mode: Mode,
        valid_BT: Tensor | None,
    ) -> tuple[Tensor, LayerOutput]:
        """`seen` is the memory, if there is one, and then x; `places` what this attention wants to know of positions."""
        moe_norm = self.moe_norm or self.moe.norm
        if self.pre:
            x_BTD = x_BTD + self.dropout(self.attention(self.attention_norm(seen_BSD), places))
            y_BTD, output = self._mix(moe_norm(x_BTD), tokens_BT, mode, valid_BT)
            return x_BTD + y_BTD, output
        x_BTD = self.attention_norm(x_BTD + self.dropout(self.attention(seen_BSD, places)))
        y_BTD, output = self._mix(x_BTD, tokens_BT, mode, valid_BT)
        return moe_norm(x_BTD + y_BTD), output

    def _mix(self, x_BTD: Tensor, tokens_BT: Tensor | None, mode: Mode, valid_BT: Tensor | None) -> tuple[Tensor, LayerOutput]:
        if valid_BT is None:
            output = self.moe(x_BTD.flatten(0, 1), mode, None if tokens_BT is None else tokens_BT.flatten(), x_BTD.shape[1])
            y_BTD = output.y_ND.view_as(x_BTD)
        else:
            output = self.moe(x_BTD[valid_BT], mode, tokens_BT[valid_BT])
            # Of the experts' type, which in bfloat16 is not that of the residual stream.
            y_BTD = output.y_ND.new_zeros(x_BTD.shape).masked_scatter(valid_BT[..., None], output.y_ND)
        if self.shared is not None:
            y_BTD = y_BTD + self.shared(x_BTD)
        return self.dropout(y_BTD), output


class Attention(nn.Module):
    """Attention, causal or to all tokens, whose positions are rotary or already in its input."""

    def __init__(self, width: int, heads: int, head_width: int, *, causal: bool = True) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.qkv = nn.Linear(width, 3 * heads * head_width)
        self.project = nn.Linear(heads * head_width, width)

    def forward(self, x_BTD: Tensor, rotary: nn.Module | None) -> Tensor:
        qk, v = self.qkv(x_BTD).unflatten(-1, (3 * self.heads, -1)).split([2 * self.heads, self.heads], dim=2)
        q, k = (qk if rotary is None else rotary(qk)).chunk(2, dim=2)
        y_BHTF = F.scaled_dot_product_attention(*(part.transpose(1, 2) for part in (q, k, v)), is_causal=self.causal)
        return self.project(y_BHTF.transpose(1, 2).flatten(2))
