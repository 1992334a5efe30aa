"""What a report of a bug wants to know, and what would stop a run on this machine."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

from pipeline import config, tracking
from pipeline.errors import Failure, UsageError
from pipeline.moe.layer import SETTINGS

GIB = 2**30
# An installation takes more; a default run with its cache less.
ROOM = 2 * GIB
DVC_SECONDS = 120


class Finding(NamedTuple):
    """Something about this machine; a problem says what it stops and what to do."""

    name: str
    value: str
    problem: str = ""


def examine(root: Path) -> Iterator[Finding]:
    """Versions, machine, params, git, DVC, MLflow's store and disk, as far as they can be found out."""
    tags = tracking.surroundings(root)
    yield Finding("vqmoe", version("vqmoe"))
    for name in sorted(tag for tag in tags if tag.startswith("vqmoe.version.")):
        yield Finding(name.removeprefix("vqmoe.version."), tags[name])
    yield Finding("cpu", f"{tags['vqmoe.cpu']}, {len(os.sched_getaffinity(0))} cores, {tags['vqmoe.threads']} threads")
    yield Finding("memory", f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / GIB:.1f} GiB")
    yield Finding("gpu", tags["vqmoe.gpu"] or "none")
    yield _params(root)
    commit = tags.get("mlflow.source.git.commit")
    changed = ", with changes" if tags.get("vqmoe.git_dirty") == "true" else ""
    lost = "" if commit else "no commit here: runs cannot be reproduced; `git init` and commit, or clone the repository"
    yield Finding("git", f"{commit}{changed}" if commit else "none", lost)
    yield _dvc(root)
    yield _store(root)
    for name, place in {"disk": root, "temporary files": Path(tempfile.gettempdir())}.items():
        free = shutil.disk_usage(place).free
        full = f"under {ROOM / GIB:.0f} GiB are free in {place}; a run may not fit" if free < ROOM else ""
        yield Finding(name, f"{free / GIB:.1f} GiB free in {place}", full)


def _params(root: Path) -> Finding:
    try:
        params = config.load(root / "params.yaml", SETTINGS)
    except (UsageError, Failure) as error:
        return Finding("params.yaml", "cannot be used", str(error))
    grid = f"{', '.join(params.grid.methods)}; seeds {', '.join(map(str, params.grid.seeds))}"
    return Finding("params.yaml", f"{grid}; on {params.machine.device}")


def _dvc(root: Path) -> Finding:
    if not (root / "dvc.yaml").exists():
        return Finding("dvc stages", "none", f"{root} has no dvc.yaml; run inside the repository")
    try:
        done = subprocess.run(
            [sys.executable, "-m", "dvc", "status", "--quiet"], cwd=root, capture_output=True, text=True, timeout=DVC_SECONDS
        )
    except subprocess.TimeoutExpired:
        return Finding("dvc stages", "unknown", f"`dvc status` takes over {DVC_SECONDS} s; another dvc may be at work here")
    if done.returncode == 1:
        return Finding("dvc stages", "changed since the last `dvc repro`")
    last = (done.stderr.strip().splitlines() or ["no message"])[-1]
    return (
        Finding("dvc stages", "unknown", f"`dvc status` fails: {last}")
        if done.returncode
        else Finding("dvc stages", "up to date")
    )


def _store(root: Path) -> Finding:
    where, unsent, problem = tracking.reach(root)
    if not problem and unsent:
        problem = f"{unsent} runs are not sent yet; `vqmoe track sync` sends them"
    return Finding("mlflow store", where, problem)
