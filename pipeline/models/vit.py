"""Vision Transformer that classifies images, with experts in some of its blocks (V-MoE, Riquelme et al. 2021).

Shapes: B images, C channels, H height, W width, P patches of an image, T = P tokens or P + 1 with a class token, D width of the
model, L labels.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pipeline.config import VisionModel
from pipeline.models.backbone import Attention, Backbone, Block, Hidden
from pipeline.moe.experts import FeedForward
from pipeline.moe.layer import Dense, Mode, build_layer
from pipeline.moe.routers.base import Settings, Sizes


class Vit(Backbone):
    """Patches of `size` x `size` images, row by row, with learned positions; every one attends to all; normalisation comes first.

    The head is one linear layer on the normalised class token or on the mean of the normalised patches. It starts at zero: to a
    fresh one all labels are equally likely.
    """

    def __init__(self, model: VisionModel, method: str, settings: Settings, channels: int, size: int, labels: int) -> None:
        super().__init__(model.width)
        self.shape = (channels, size, size)
        self.grid = (size // model.patch, size // model.patch)
        self._expert_blocks = model.expert_blocks
        self.register_buffer("mean_C", torch.zeros(channels))
        self.register_buffer("deviation_C", torch.ones(channels))
        self.embedding = nn.Conv2d(channels, model.width, model.patch, model.patch)
        self.class_D = nn.Parameter(torch.zeros(model.width)) if model.pooling == "class" else None
        tokens = math.prod(self.grid) + (model.pooling == "class")
        self.positions_TD = nn.Parameter(torch.empty(tokens, model.width).normal_(std=0.02))
        self.dropout = nn.Dropout(model.dropout)
        self.blocks = nn.ModuleList(self._block(model, method, settings, index) for index in range(model.layers))
        self.norm = nn.LayerNorm(model.width)
        self.head = nn.Linear(model.width, labels)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    @property
    def expert_blocks(self) -> tuple[int, ...]:
        return self._expert_blocks

    def normalise_by(self, mean_C: Tensor | Sequence[float], deviation_C: Tensor | Sequence[float]) -> None:
        """Mean and deviation of each channel's pixels, to be subtracted and divided by; saved with the model.

        A deviation under one grey level counts as one: a channel may be constant.
        """
        self.mean_C.copy_(torch.as_tensor(mean_C))
        self.deviation_C.copy_(torch.as_tensor(deviation_C).clamp(min=1 / 255))

    def load_backbone(self, other: "Vit") -> None:
        """Take everything from a model that differs in its labels only, but for the head, which stays as it is."""
        self.load_state_dict(other.state_dict() | self.head.state_dict(prefix="head."))

    def patches(self, token_N: Tensor) -> Tensor:
        """Of something that each token of a batch has (B T, ...), that of the patches (B, P, ...): no class token."""
        return token_N.unflatten(0, (-1, len(self.positions_TD)))[:, self.class_D is not None :]

    def forward(self, pixels_BCHW: Tensor, mode: Mode) -> tuple[Tensor, Hidden]:
        """Scores (B, L) of images in [0, 1], and the hidden states, a class token first."""
        x_BCHW = (pixels_BCHW.to(self.device) - self.mean_C[:, None, None]) / self.deviation_C[:, None, None]
        x_BTD = self.embedding(x_BCHW).flatten(2).transpose(1, 2)
        if self.class_D is not None:
            x_BTD = torch.cat([self.class_D.expand(len(x_BTD), 1, -1), x_BTD], 1)
        x_BTD = self.dropout(x_BTD + self.positions_TD)
        layers = []
        for index, block in enumerate(self.blocks):
            mixes = index in self.expert_blocks
            x_BTD, output = block(x_BTD, x_BTD, None, None, mode if mixes else "dense", None)
            if mixes:
                layers.append(output)
        state_BTD = self.norm(x_BTD)
        pooled_BD = state_BTD.mean(1) if self.class_D is None else state_BTD[:, 0]
        return self.head(pooled_BD), Hidden(state_BTD, layers, [])

    def _block(self, model: VisionModel, method: str, settings: Settings, index: int) -> Block:
        attention = Attention(model.width, model.heads, model.head_width, causal=False)
        shared = None
        if index in model.expert_blocks:
            moe = build_layer(method, settings, Sizes(model.width, model.experts, model.expert_width, 0, model.dropout))
            if model.shared_width:
                shared = FeedForward(model.width, model.shared_width, model.dropout)
        else:
            moe = Dense(Dense.Settings(top_k=1), Sizes(model.width, 1, model.dense_width, 0, model.dropout))
        return Block(model.width, attention, moe, model.dropout, shared=shared)
