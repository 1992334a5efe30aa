"""Heads on top of a backbone.

Shapes: B sequences, T positions, D width, L labels.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from pipeline.models.transformer import Hidden, Transformer
from pipeline.moe.layer import Mode


class Classifier(nn.Module):
    """Linear-Tanh, pooled over the sequence, then Dropout-Linear.

    Pooling `last` takes the last token, which is the paper's head (METHOD section 4). `mean` takes the mean of all tokens
    times the square root of their number: a model of characters pre-trained briefly keeps little of a passage in its
    last state, and what tells passages apart in a mean shrinks with that root.
    """

    def __init__(self, backbone: Transformer, labels: int, pooling: Literal["last", "mean"], dropout: float) -> None:
        super().__init__()
        self.pooling = pooling
        width = backbone.width
        self.backbone = backbone
        self.features = nn.Sequential(nn.Linear(width, width), nn.Tanh())
        self.scores = nn.Sequential(nn.Dropout(dropout), nn.Linear(width, labels))

    def forward(self, tokens_BT: Tensor, lengths_B: Tensor, mode: Mode) -> tuple[Tensor, Hidden]:
        """Scores (B, L) of right-padded sequences with their real lengths, and the backbone's hidden states."""
        tokens_BT, lengths_B = tokens_BT.to(self.backbone.device), lengths_B.to(self.backbone.device)
        valid_BT = torch.arange(tokens_BT.shape[1], device=tokens_BT.device) < lengths_B[:, None]
        hidden = self.backbone(tokens_BT, mode, None if valid_BT.all() else valid_BT)
        if self.pooling == "last":
            last_BD = hidden.state_BTD[torch.arange(len(lengths_B), device=tokens_BT.device), lengths_B - 1]
            return self.scores(self.features(last_BD)), hidden
        sum_BD = (self.features(hidden.state_BTD) * valid_BT[..., None]).sum(1)
        return self.scores(sum_BD / lengths_B[:, None].sqrt()), hidden
