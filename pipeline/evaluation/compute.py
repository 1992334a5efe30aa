"""Time and memory of pieces of work that are to be compared.

Shapes: R rounds.
"""

import ctypes
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from scipy import stats

Work = Callable[[], object]


class Interval(NamedTuple):
    """A median and the ends of its 95 % confidence interval."""

    median: float
    low: float
    high: float


class Measured(NamedTuple):
    """Seconds of one call in each round (R,), and `peak_memory_mib` of a call."""

    seconds_R: np.ndarray
    peak_memory_mib: float | None

    @property
    def seconds(self) -> Interval:
        return interval(self.seconds_R)


def measure(works: Mapping[str, Work], repeats: int, clock: Callable[[], float] = time.perf_counter) -> dict[str, Measured]:
    """Call all works once to warm up, then in `repeats` (at least 6) rounds, forth and back, then once each for its memory.

    So whatever drifts, such as a processor's clock, falls on all alike, and works can be compared round by round.
    """
    for work in works.values():
        work()
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(repeats):
        for name in reversed(works) if turn % 2 else works:
            _wait()
            start = clock()
            works[name]()
            _wait()
            seconds[name].append(clock() - start)
    return {name: Measured(np.array(seconds[name]), peak_memory_mib(work)) for name, work in works.items()}


def between(one: Measured, other: Measured, share: float) -> Measured:
    """A work that is `other` in this share of its calls, else `one`: mean time, round by round, and the greater memory."""
    memory = [found.peak_memory_mib for found in (one, other)]
    return Measured(one.seconds_R + share * (other.seconds_R - one.seconds_R), None if None in memory else max(memory))


def interval(values_R: np.ndarray) -> Interval:
    """The median of at least 6 values, and the values that enclose the true one in at least 95 % of all samples.

    Those are order statistics, whose ranks are binomial whatever the distribution; of fewer values not even the least and
    the greatest are that far apart.
    """
    assert len(values_R) >= 6, len(values_R)
    ends = stats.quantile_test(values_R, p=0.5).confidence_interval(0.95)
    return Interval(float(np.median(values_R)), float(ends.low), float(ends.high))


def saving(work: Measured, reference: Measured) -> Interval:
    """Share of the reference's time that a work saves, compared round by round; negative where it takes longer."""
    return interval(1 - work.seconds_R / reference.seconds_R)


def peak_memory_mib(work: Work) -> float | None:
    """Most memory in use at once during a call, beyond what was in use before it, in MiB.

    On a GPU what torch has allocated there, if this process uses one; else the process's resident memory. None where the
    system tells neither: not on Linux, or without glibc.
    """
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    try:
        # Freed memory that glibc keeps would count as in use before the call, and a call that takes it again as frugal.
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the greatest resident size starts anew
        before = _status_kib("VmRSS")
    except (OSError, AttributeError):
        return None
    work()
    return (_status_kib("VmHWM") - before) / 2**10


def _status_kib(name: str) -> int:
    return int(re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def _wait() -> None:
    """A GPU answers before it is done."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
