"""Cells of the grid side by side, each by a dvc of its own in this workspace; dvc's locks keep them apart."""

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline import tracking
from pipeline.errors import Failure, UsageError, nearest
from pipeline.files import locked
from stages.paths import GRID_STAGES, Cell, cells

# A dvc that finds another at its bookkeeping waits; it would give up what it has just trained after 3 s.
REPRO = (sys.executable, "-m", "dvc", "--wait-for-lock", "repro")
LOGS = Path("outputs/logs")
PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None)


def grid(params: Any, root: Path, jobs: int, chosen: Sequence[str] = ()) -> None:
    """Reproduce the experiment in `root`, `jobs` cells (a method and a seed) at a time; what all share, or is timed, alone.

    If cells are `chosen`, by names like vqmoe-s0, reproduce these alone. Raises UsageError if there is no such cell, Failure if
    cells fail, once the others are done, if another process is at it, or if logs cannot be written.
    """
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, len(os.sched_getaffinity(0)) // jobs))
    environment = os.environ | {"OMP_NUM_THREADS": threads}
    # Only the stages that are a cell's own: to look at `prepare`, dvc locks what other cells are reading.
    commands = {
        Cell(method, seed).name: ["--single-item", *_stages(method, seed, params.data.tasks)]
        for method in params.grid.methods
        for seed in params.grid.seeds
    }
    for name in chosen:
        if name not in commands:
            raise UsageError(f"there is no cell '{name}' in the grid; there are: {', '.join(commands)}{nearest(name, commands)}")
    commands = {name: commands[name] for name in chosen or commands}
    taken = f"{root}: another `vqmoe grid` is at work here; wait for it, or stop it"
    with locked(root / LOGS / ".lock", 0, taken), tracking.terminable():
        _alone(["prepare"], root, environment)
        print(f"Cells: {len(commands)}, {jobs} at a time, OMP_NUM_THREADS={threads}; what they print: {LOGS}", flush=True)
        if failed := _run(commands, jobs, root, environment, logs=True):
            said = f"{len(failed)} of {len(commands)} cells failed: {', '.join(failed)}"
            raise Failure(f"{said}; mend what their logs name, then run it again: it goes on from here")
        if not chosen:
            _alone([], root, environment)


def _stages(method: str, seed: int, tasks: Sequence[str]) -> list[str]:
    """A cell's stages in order, as dvc names them."""
    return [
        f"{stage}@{'-'.join(str(part) for part in cell if part is not None)}"
        for stage in GRID_STAGES
        for cell in cells(stage, [method], [seed], tasks)
    ]


def _alone(targets: Sequence[str], root: Path, environment: Mapping[str, str]) -> None:
    if _run({"": targets}, 1, root, environment, logs=False):
        raise Failure(f"{' '.join(['dvc repro', *targets])}: failed; what it says above is the reason")


def _run(commands: Mapping[str, Sequence[str]], jobs: int, root: Path, environment: Mapping[str, str], logs: bool) -> list[str]:
    """Run `dvc repro` with each of the arguments, `jobs` at a time, and return the names of those that failed.

    With `logs` each prints into a file of its own, and its end is told. None is left running, however this ends.
    """
    waiting, running, failed = list(commands), {}, []
    took: list[float] = []
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                name = waiting.pop(0)
                log = root / LOGS / f"{name}.log" if logs else None
                running[name] = _start(commands[name], root, environment, log), time.monotonic()
            os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT)
            for name, (process, started) in list(running.items()):
                if process.poll() is None:
                    continue
                del running[name]
                took.append(time.monotonic() - started)
                if process.returncode:
                    failed.append(name)
                if logs and process.returncode:
                    print(f"vqmoe: {name}: failed after {took[-1]:.0f} s; see {LOGS / name}.log", file=sys.stderr, flush=True)
                elif logs:
                    # As if the others took as long as those that have ended.
                    spent = sum(time.monotonic() - started for _, started in running.values())
                    left = max(0, sum(took) / len(took) * (len(waiting) + len(running)) - spent) / jobs
                    done = f"{name}: done in {took[-1]:.0f} s, {len(took)} of {len(commands)}, about {left:.0f} s left"
                    print(done, flush=True)
    finally:
        for process, _ in running.values():
            os.killpg(process.pid, signal.SIGINT)
        for process, _ in running.values():
            process.wait()
    return failed


def _start(arguments: Sequence[str], root: Path, environment: Mapping[str, str], log: Path | None) -> subprocess.Popen:
    """A dvc with a session of its own, that Ctrl-C reaches through this process alone; it ends if this process is killed."""

    def prepare() -> None:
        _LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        # Shells have it ignored by what they start in the background.
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    with open(log or os.devnull, "wb") as file:
        return subprocess.Popen(
            [*REPRO, *arguments],
            cwd=root,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=file if log else None,
            stderr=file if log else None,
            start_new_session=True,
            preexec_fn=prepare,
        )
