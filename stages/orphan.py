"""A stage stops when its dvc is gone, so that the next dvc need not wait for it."""

import os
import signal
import sys
import threading
import time
from pathlib import Path

SECONDS = 1.0


def stop_with_dvc() -> None:
    """Watch the dvc that started this process, if one did, and end as by SIGTERM when it has ended; where there is /proc."""
    dvc = _dvc() if "DVC_STAGE" in os.environ else None
    if dvc is None:
        return

    def watch() -> None:
        while _started(dvc[0]) == dvc[1]:
            time.sleep(SECONDS)
        print("vqmoe: the dvc that started this stage is gone; the next `dvc repro` goes on from here", file=sys.stderr)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def _dvc() -> tuple[int, str] | None:
    """Process and start of the nearest ancestor that is dvc, of this process's parent if none is."""
    pid = parent = os.getppid()
    while pid > 1:
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        except OSError:
            break
        if any(Path(os.fsdecode(word)).name == "dvc" for word in words[:3]):
            parent = pid
            break
        pid = int(_stat(pid)[1])
    start = _started(parent)
    return (parent, start) if start else None


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
