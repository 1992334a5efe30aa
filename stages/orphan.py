"""A stage stops when the dvc or the torchrun that started it is gone, so that the next one need not wait for it."""

import os
import signal
import sys
import threading
import time
from functools import cache
from pathlib import Path

LAUNCHER = "VQMOE_LAUNCHER"  # its process
SECONDS = 1.0
SHELLS = ("sh", "bash", "dash", "zsh", "ksh", "fish")


@cache  # who started a process stays the same, however many stages it runs
def stop_with_dvc() -> None:
    """Watch the dvc and the torchrun that started this process, if they did, and end as by SIGTERM when one has ended.

    Where there is no /proc, nothing is watched.
    """
    watched = {}
    if _stat(os.getpid()) and "DVC_STAGE" in os.environ:
        watched["dvc"] = _dvc()
    if _stat(os.getpid()) and "TORCHELASTIC_RUN_ID" in os.environ:
        # Which it is, is said by the one that `launch` makes, in case that it was gone before this process could look.
        parent = int(os.environ.get(LAUNCHER, os.getppid()))
        watched["torchrun"] = (parent, _started(parent) or "")

    def watch() -> None:
        while not (gone := [name for name, (pid, started) in watched.items() if _started(pid) != started]):
            time.sleep(SECONDS)
        print(f"vqmoe: the {gone[0]} that started this stage is gone; the next run goes on from here", file=sys.stderr)
        os.kill(os.getpid(), signal.SIGTERM)

    if watched:
        threading.Thread(target=watch, daemon=True).start()


def _dvc() -> tuple[int, str]:
    """Process and start of the nearest ancestor that is dvc, or else that is no shell, such as a program that uses dvc's API.

    Where that is the one which takes over orphans, dvc was gone before this process could look: no process starts at "".
    """
    ancestors, pid = [], os.getppid()
    while pid > 0:
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        except OSError:
            break
        ancestors.append((pid, [Path(os.fsdecode(word)).name for word in words[:3]]))
        pid = int(_stat(pid)[1])
    for pid, names in ancestors:
        if "dvc" in names:
            return pid, _started(pid) or ""
    pid, names = next(((pid, names) for pid, names in ancestors if names[0] not in SHELLS), (1, ["init"]))
    return pid, "" if pid == 1 or names[0] == "systemd" else _started(pid) or ""


def _started(pid: int) -> str | None:
    """When a process started, in ticks of this system; None once it has ended."""
    stat = _stat(pid)
    return stat[19] if stat and stat[0] not in "ZX" else None


def _stat(pid: int) -> list[str]:
    """Fields of /proc/<pid>/stat from the state on; the name before them may hold anything."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []
