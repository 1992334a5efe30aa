"""Optimizer and learning-rate schedule."""

import math

import torch
from torch import nn

from pipeline.config import Training


def adam(model: nn.Module, learning_rate: float, beta2: float = 0.98, weight_decay: float = 0.0) -> torch.optim.Optimizer:
    """Adam for what wants a gradient; decoupled weight decay on what multiplies hidden states, and on embeddings.

    Those are called w... and have more than one dimension. Experts' biases have two as well, and codes and experts' embeddings
    are places in the space of states: none of them decays.
    """
    groups: dict[float, list[nn.Parameter]] = {weight_decay: [], 0.0: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays = parameter.dim() >= 2 and name.rpartition(".")[2].startswith("w")
            groups[weight_decay if decays else 0.0].append(parameter)
    return torch.optim.AdamW(
        [{"params": parameters, "weight_decay": decay} for decay, parameters in groups.items()],
        lr=learning_rate,
        betas=(0.9, beta2),
        fused=True,
    )


def learning_rate(training: Training, step: int) -> float:
    """Linear ramp over the first `ramp` share of the steps, then a cosine to zero; `step` counts from 0."""
    ramp = max(1, round(training.ramp * training.steps))
    if step < ramp:
        return training.learning_rate * (step + 1) / ramp
    done = (step - ramp) / max(1, training.steps - ramp)
    return training.learning_rate * 0.5 * (1 + math.cos(math.pi * done))
