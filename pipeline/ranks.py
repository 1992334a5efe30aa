"""Processes that share every training step: each takes its part of a batch, and all keep the same model (data parallel).

What a training minimises is the mean over ranks of what each finds on its part. All of them go through it in step, validations
too, and call the functions here in the same order; in a process alone, and outside of a training, these give back what they
were given.
"""

import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

# Rows that codes are placed by, of all ranks together.
GATHERED = 2**16

Objective = Callable[[int], tuple[Tensor, Mapping[str, Tensor]]]

_training = False


@contextmanager
def training() -> Iterator[None]:
    """A training, for whose time the processes that have met are ranks."""
    global _training
    _training = True
    try:
        yield
    finally:
        _training = False


def count() -> int:
    """How many processes share a step."""
    return dist.get_world_size() if _training and dist.is_initialized() else 1


def rank() -> int:
    """Which of them this is, from 0. The first one alone records and writes."""
    return dist.get_rank() if dist.is_initialized() else started("RANK", 0)


def started(name: str, alone: int) -> int:
    """A number that torchrun gave this process; `alone` in one that it did not start, whatever its environment says."""
    return int(os.environ[name]) if "TORCHELASTIC_RUN_ID" in os.environ else alone


def part(batch: int) -> slice:
    """The rows of a batch that are this rank's."""
    share = batch // count()
    return slice(rank() * share, (rank() + 1) * share) if count() > 1 else slice(None)


def total(x: Tensor) -> Tensor:
    """Sum over ranks, with the gradient that it has in the mean over ranks of a loss that all of them compute from it."""
    return _Total.apply(x) if count() > 1 else x


def mean(x: Tensor) -> Tensor:
    """Mean over ranks."""
    return total(x) / count() if count() > 1 else x


def agreed(x: Tensor) -> Tensor:
    """What the first rank has: for draws that all have to share."""
    if count() > 1:
        x = x.clone()
        dist.broadcast(x, 0)
    return x


def agree(module: nn.Module) -> None:
    """Give a module the parameters and buffers that it has on the first rank."""
    if count() > 1:
        for tensor in (*module.parameters(), *module.buffers()):
            dist.broadcast(tensor.detach(), 0)


def gathered(x: Tensor, limit: int | None = None) -> Tensor:
    """The rows of all ranks, in their order; at most about `limit` of them, the first ones of each."""
    if count() == 1:
        return x
    x = x if limit is None else x[: max(1, limit // count())]
    lengths = [torch.zeros((), dtype=torch.long, device=x.device) for _ in range(count())]
    dist.all_gather(lengths, torch.tensor(len(x), device=x.device))
    longest = int(max(lengths))
    whole = [x.new_empty(longest, *x.shape[1:]) for _ in range(count())]
    dist.all_gather(whole, torch.cat([x, x.new_zeros(longest - len(x), *x.shape[1:])]))
    return torch.cat([rows[:length] for rows, length in zip(whole, lengths, strict=True)])


def reseed(seed: int, step: int) -> None:
    """Let ranks draw dropout and noise of their own; the first one draws as a process alone would.

    A function of the step, so that a training which goes on needs no other state of it, even with another number of ranks.
    """
    if rank():
        torch.manual_seed(int(np.random.SeedSequence((seed, step, rank())).generate_state(1, np.uint64)[0]))


def replicated(model: nn.Module, objective: Objective) -> Objective:
    """The objective, after whose backward pass each parameter has the mean of its gradients over ranks.

    Torch's data parallelism wraps the whole of it, since parameters are used outside of the model's forward pass too. Which
    parameters a step uses depends on the mode.
    """
    if count() == 1:
        return objective
    with warnings.catch_warnings():
        # Its new name is not known to all versions of torch.
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
        return DistributedDataParallel(
            _Step(model, objective), broadcast_buffers=False, find_unused_parameters=True, gradient_as_bucket_view=True
        )


class _Step(nn.Module):
    def __init__(self, model: nn.Module, objective: Objective) -> None:
        super().__init__()
        self.model, self.objective = model, objective

    def forward(self, step: int) -> tuple[Tensor, Mapping[str, Tensor]]:
        return self.objective(step)


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.clone()
        dist.all_reduce(gradient)
        return gradient
