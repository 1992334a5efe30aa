"""What a report of a bug wants to know, and what would stop a run on this machine."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Container, Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from pipeline import config, tracking
from pipeline.data import corpora, published, tasks
from pipeline.errors import Failure, UsageError
from pipeline.moe.layer import SETTINGS
from stages.paths import of_images

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
    """Versions, machine, params and data, git, DVC, MLflow's store and disk, as far as they can be found out."""
    tags = tracking.surroundings(root)
    yield Finding("vqmoe", version("vqmoe"))
    for name in sorted(tag for tag in tags if tag.startswith("vqmoe.version.")):
        yield Finding(name.removeprefix("vqmoe.version."), tags[name])
    yield Finding("cpu", f"{tags['vqmoe.cpu']}, {len(os.sched_getaffinity(0))} cores, {tags['vqmoe.threads']} threads")
    yield Finding("memory", f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / GIB:.1f} GiB")
    yield Finding("gpu", tags["vqmoe.gpu"] or "none")
    yield from _params(root)
    commit = tags.get("mlflow.source.git.commit")
    changed = ", with changes" if tags.get("vqmoe.git_dirty") == "true" else ""
    lost = "" if commit else "no commit here: runs cannot be reproduced; `git init` and commit, or clone the repository"
    yield Finding("git", f"{commit}{changed}" if commit else "none", lost)
    yield _dvc(root)
    yield _store(root)
    for name, place in {"disk": root, "temporary files": Path(tempfile.gettempdir())}.items():
        free = shutil.disk_usage(place).free
        problem = f"under {ROOM / GIB:.0f} GiB are free in {place}; a run may not fit" if free < ROOM else ""
        if not os.access(place, os.W_OK | os.X_OK):
            problem = f"{place} cannot be written, where runs keep what they make; mend its permissions, or use a copy"
        yield Finding(name, f"{free / GIB:.1f} GiB free in {place}", problem)


def _params(root: Path) -> Iterator[Finding]:
    try:
        params = config.load(root / "params.yaml", SETTINGS)
    except (UsageError, Failure) as error:
        yield Finding("params.yaml", "cannot be used", str(error))
        return
    grid = f"{', '.join(params.grid.methods)}; seeds {', '.join(map(str, params.grid.seeds))}"
    yield Finding("params.yaml", f"{grid}; on {params.machine.device}")
    yield from _data(params.data, root)


def _data(data: config.Data, root: Path) -> Iterator[Finding]:
    """What is learnt from and tested on; a problem where that has no name to be fetched by and is not there. Nothing is read."""
    if of_images(data.view):
        # Loads torchvision, which texts need not wait for.
        from pipeline.data.image_sets import PUBLISHED, image_source, stored_images

        corpus = task = shift = (image_source, {"digits", *PUBLISHED}, stored_images)
    else:
        corpus = (corpora.source, {*corpora.PUBLISHED}, corpora.load_corpus)
        shift = (*corpus[:2], partial(corpora.load_corpus, key="data.shifts"))
        task = (tasks.task_source, {"era", *published.TASKS}, lambda name, root: tasks.load_task(name, {}, root, 0))
    given = data.model_dump()
    for key, reading in {"corpus": corpus, "tasks": task, "shifts": shift, "outside": shift}.items():
        if named := [data.corpus] if key == "corpus" else [*given.get(key, {}).values()]:
            yield Finding(f"data.{key}", ", ".join(named), "; ".join(filter(None, (_lost(one, root, *reading) for one in named))))


def _lost(
    name: str, root: Path, place: Callable[[str, Path], Path], fetched: Container[str], load: Callable[[str, Path], Any]
) -> str:
    """What `prepare` would say if the data that `name` stands for is missing; else ""."""
    if name in fetched or corpora.exists(place(name, root)):
        return ""
    try:
        load(name, root)
    except (UsageError, Failure) as error:
        return str(error)
    return ""


def _dvc(root: Path) -> Finding:
    if not (root / "dvc.yaml").exists():
        return Finding("dvc stages", "none", f"{root} has no dvc.yaml; run inside the repository")
    try:
        done = subprocess.run(
            [sys.executable, "-m", "dvc", "status", "--json"], cwd=root, capture_output=True, text=True, timeout=DVC_SECONDS
        )
    except subprocess.TimeoutExpired:
        return Finding("dvc stages", "unknown", f"`dvc status` takes over {DVC_SECONDS} s; another dvc may be at work here")
    if done.returncode:
        # In the end it says where to ask.
        lines = done.stderr.strip().splitlines() or ["no message"]
        said = next((line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR:")), lines[0])
        return Finding("dvc stages", "unknown", f"`dvc status` fails: {said}")
    return Finding("dvc stages", "changed since the last `dvc repro`" if json.loads(done.stdout) else "up to date")


def _store(root: Path) -> Finding:
    where, unsent, problem = tracking.reach(root)
    waiting = f"; runs unsent or unfinished: {unsent} (the next run or `vqmoe track sync` sends them)" if unsent else ""
    return Finding("mlflow store", f"{where}{waiting}", problem)
