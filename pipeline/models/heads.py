"""Heads on top of a backbone.

Shapes: B sequences, T positions, D width, L labels.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from pipeline.models.transformer import Hidden, Transformer
from pipeline.moe.layer import Mode


class Classifier(nn.Module):
    """Linear-Tanh-Dropout-Linear on one hidden state per sequence: of its last token (the paper), or their mean.

    A model of characters pre-trained briefly keeps little of a passage in its last state; the mean keeps all of it.
    """

    def __init__(self, backbone: Transformer, labels: int, pooling: Literal["last", "mean"], dropout: float) -> None:
        super().__init__()
        self.pooling = pooling
        width = backbone.embedding.embedding_dim
        self.backbone = backbone
        self.head = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Dropout(dropout), nn.Linear(width, labels))

    def forward(self, tokens_BT: Tensor, lengths_B: Tensor, mode: Mode) -> tuple[Tensor, Hidden]:
        """Scores (B, L) of right-padded sequences with their real lengths, and the backbone's hidden states."""
        valid_BT = torch.arange(tokens_BT.shape[1], device=tokens_BT.device) < lengths_B[:, None]
        hidden = self.backbone(tokens_BT, mode, None if valid_BT.all() else valid_BT)
        if self.pooling == "last":
            pooled_BD = hidden.state_BTD[torch.arange(len(lengths_B), device=tokens_BT.device), lengths_B - 1]
        else:
            pooled_BD = (hidden.state_BTD * valid_BT[..., None]).sum(1) / lengths_B[:, None]
        return self.head(pooled_BD), hidden
