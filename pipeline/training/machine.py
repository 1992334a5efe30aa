"""Where and how exactly models compute."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from pipeline.config import Machine
from pipeline.errors import Failure


@contextmanager
def at_work(machine: Machine) -> Iterator[None]:
    """Compute with this precision, on a GPU with the same bits every time. Raises Failure if the device is not there."""
    if machine.device == "cuda":
        if not torch.cuda.is_available():
            raise Failure("machine.device is cuda: torch finds no GPU here; set it to cpu")
        # Without it products on several streams may share a workspace, and sum in another order.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        # The backward of this attention adds up in no fixed order.
        torch.backends.cuda.enable_mem_efficient_sdp(False)
    # Weights change with every step, so what was cast of them is of no use to the next.
    with torch.autocast(machine.device, torch.bfloat16, enabled=machine.precision == "bf16", cache_enabled=False):
        yield
