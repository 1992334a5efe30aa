"""Where, how exactly and by how many processes models compute."""

import atexit
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from pipeline import ranks
from pipeline.config import Machine
from pipeline.errors import Failure, UsageError

# The others wait for as long as the first process tests and records; of one that died torchrun knows.
PATIENCE = timedelta(days=30)


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


@contextmanager
def together(machine: Machine) -> Iterator[None]:
    """Share training steps with the other processes that torchrun started; alone, where params ask for one process.

    Raises UsageError if these are not as many as params ask for, Failure if there is no GPU for this one or another one ends.
    """
    started = ranks.started("WORLD_SIZE", 1)
    if started != machine.processes:
        raise UsageError(f"machine.processes is {machine.processes}: {started} were started; set it to {started}")
    if started == 1:
        yield
        return
    if not dist.is_initialized():
        _meet(machine)
    # The others go on once the first has written what the stage before left.
    dist.broadcast(torch.zeros(1), 0)
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, dist.DistBackendError) or "by peer" in str(error):
            raise Failure(f"one of the {started} processes that share this training has ended; run it again") from None
        raise


def _meet(machine: Machine) -> None:
    """For the rest of this process's life: a second meeting in the same place would find what the first left there."""
    if machine.device == "cuda":
        place, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if place >= gpus:
            raise Failure(f"machine.processes is {machine.processes}: this machine has {gpus} GPUs; start no more here")
        torch.cuda.set_device(place)
    # Tensors of the GPU over NCCL, those of the CPU over gloo.
    dist.init_process_group(timeout=PATIENCE)
    atexit.register(dist.destroy_process_group)
