"""Optimizer and learning-rate schedule."""

import math
from collections.abc import Iterable

import torch
from torch import nn

from pipeline.config import Training


def adam(
    parameters: Iterable[nn.Parameter], learning_rate: float, beta2: float = 0.98, weight_decay: float = 0.0
) -> torch.optim.Optimizer:
    """Adam with decoupled weight decay on matrices only (vectors are biases and norms)."""
    learned = [p for p in parameters if p.requires_grad]
    groups = [
        {"params": [p for p in learned if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in learned if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, beta2), fused=True)


def learning_rate(training: Training, step: int) -> float:
    """Linear ramp over the first `ramp` share of the steps, then a cosine to zero; `step` counts from 0."""
    ramp = max(1, round(training.ramp * training.steps))
    if step < ramp:
        return training.learning_rate * (step + 1) / ramp
    done = (step - ramp) / max(1, training.steps - ramp)
    return training.learning_rate * 0.5 * (1 + math.cos(math.pi * done))
