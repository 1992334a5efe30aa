"""What a layer does in some training steps only. Whoever wants to know what a step costs settles it."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from pipeline import ranks

_settled: bool | None = None


def happens(probability: float) -> bool:
    """Whether it does in this step: for all processes that share the step, or for none."""
    drawn = torch.rand(())  # even where nothing can happen, so that settings change no other draw
    if probability == 0:
        return False
    return bool(ranks.agreed(drawn) < probability) if _settled is None else _settled


@contextmanager
def settled(outcome: bool) -> Iterator[None]:
    """Within this, what may happen always does, or never."""
    global _settled
    before, _settled = _settled, outcome
    try:
        yield
    finally:
        _settled = before
