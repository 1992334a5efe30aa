import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch

from pipeline.evaluation import compute
from pipeline.evaluation.compute import Interval, Measured, between, interval, measure, peak_memory_mib, saving
from tests.conftest import REPOSITORY


class Machine:
    """Works that move a clock by what they are said to take, and keep a list of who was called."""

    def __init__(self):
        self.now, self.slower, self.calls = 0.0, 1.0, []

    def work(self, name, seconds):
        def call():
            self.calls.append(name)
            self.now += seconds * self.slower

        return call


def test_rounds_go_forth_and_back_between_a_warm_up_and_a_call_for_memory(monkeypatch):
    monkeypatch.setattr(compute, "peak_memory_mib", lambda work: work())
    machine = Machine()
    works = {name: machine.work(name, seconds) for name, seconds in {"a": 1.0, "b": 2.0, "c": 4.0}.items()}
    measured = measure(works, 6, clock=lambda: machine.now)
    assert "".join(machine.calls) == "abc" + 3 * "abccba" + "abc"
    assert {name: list(one.seconds_R) for name, one in measured.items()} == {"a": [1.0] * 6, "b": [2.0] * 6, "c": [4.0] * 6}
    assert measured["c"].seconds == Interval(4.0, 4.0, 4.0)


def test_a_drift_of_the_machine_leaves_the_saving_alone(monkeypatch):
    monkeypatch.setattr(compute, "peak_memory_mib", lambda work: None)
    machine = Machine()
    works = {"both": machine.work("both", 4.0), "discrete": machine.work("discrete", 3.0)}

    def clock():
        machine.slower = 2.0 ** (len(machine.calls) // 2)  # of each round, warm-up included
        return machine.now

    measured = measure(works, 7, clock)
    assert measured["both"].seconds_R[-1] == 64 * measured["both"].seconds_R[0]
    assert saving(measured["discrete"], measured["both"]) == (0.25, 0.25, 0.25)


def test_a_work_between_two_takes_their_mean_time_in_each_round_and_all_the_memory():
    one, other = Measured(np.array([1.0, 2.0]), 3.0), Measured(np.array([5.0, 2.0]), 9.0)
    found = between(one, other, 0.25)
    assert found.seconds_R.tolist() == [2.0, 2.0]
    assert found.peak_memory_mib == 9.0
    assert between(one, Measured(np.ones(2), None), 0.25).peak_memory_mib is None


def test_saving_is_the_median_over_rounds_and_not_that_of_medians():
    work = Measured(np.array([1.0, 2.0, 3.0, 1.0, 5.0, 9.0]), None)
    reference = Measured(np.array([2.0, 8.0, 4.0, 1.0, 4.0, 10.0]), None)
    assert saving(work, reference) == pytest.approx((0.175, -0.25, 0.75))


@pytest.mark.parametrize("count", range(6, 30))
def test_the_interval_is_the_narrowest_of_ranks_that_holds_the_median_in_95_percent(count, seeded):
    values_R = np.random.default_rng(count).permutation(count) + 1.0

    def missed(rank):
        """Probability that the median is below the value of this rank, or above its counterpart."""
        return 2 * sum(math.comb(count, below) for below in range(rank)) / 2**count

    median, low, high = interval(values_R)
    assert median == (count + 1) / 2
    assert low + high == count + 1
    assert missed(int(low)) <= 0.05 < missed(int(low) + 1)


def test_five_values_have_no_such_interval():
    with pytest.raises(AssertionError):
        interval(np.arange(5.0))


MEMORY = """
import json
import torch
from pipeline.evaluation.compute import measure

def hold(pieces, kib):
    # Small pieces are what glibc would keep; one large one goes back to the system at once.
    return lambda: [torch.ones(kib * 256) for _ in range(pieces)]

def twice():
    hold(1, 100 * 1024)()
    hold(1, 100 * 1024)()

# Twice by itself and first: a place that the pieces left in the heap may be given to a tensor, and stays with the heap.
measured = measure({"twice": twice}, 6)
works = {"large": hold(1, 200 * 1024), "small": hold(1, 20 * 1024), "pieces": hold(1600, 128), "few": hold(80, 128)}
measured |= measure(works, 6)
print(json.dumps({name: one.peak_memory_mib for name, one in measured.items()}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_memory_is_that_of_the_call_at_its_peak():
    # As in a stage, in a process of its own: the heap of this one has places that other tests left.
    done = subprocess.run([sys.executable, "-c", MEMORY], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    wanted = {"large": 200, "small": 20, "pieces": 200, "few": 10, "twice": 100}
    assert json.loads(done.stdout) == pytest.approx(wanted, abs=4)


def test_memory_of_a_gpu(monkeypatch):
    allocated = {"now": 5 * 2**20, "peak": 900 * 2**20}

    def work():
        allocated["peak"] = max(allocated["peak"], 8 * 2**20)

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: allocated["now"])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: allocated["peak"])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: allocated.update(peak=allocated["now"]))
    assert peak_memory_mib(work) == 3.0


def test_no_memory_where_the_system_does_not_tell_it_but_errors_of_the_work_pass(monkeypatch):
    def refused(*_):
        raise PermissionError

    with pytest.raises(PermissionError):
        peak_memory_mib(refused)
    monkeypatch.setattr(compute.Path, "write_text", refused)
    assert peak_memory_mib(lambda: None) is None
