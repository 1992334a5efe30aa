"""Where a stage that was cut off goes on: a folder for each stage and cell and all that its result depends on."""

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pipeline import tracking
from pipeline.config import Resume, fingerprint, plain
from pipeline.files import digest, locked
from pipeline.training.states import States
from stages.paths import CODE, COMMON_CODE, Cell, Paths

CODE_ROOT = Path(__file__).parents[1]
# A process whose dvc was killed notices within a second or two.
WAIT_SECONDS = 20.0


@contextmanager
def resumable(
    stage: str, chosen: Any, settings: Resume, paths: Paths, cell: Cell | None, inputs: Iterable[Path]
) -> Iterator[States]:
    """States of the stage's training, held by this process alone; removed once the body has succeeded.

    Raises Failure if another process runs the same stage, or the folder cannot be written.
    """
    states = states_of(stage, chosen, settings, paths, cell, inputs)
    folder = states.folder
    taken = f"{folder}: another process runs {_name(stage, cell)} with the same params; wait for it, or stop it"
    with locked(folder / ".lock", WAIT_SECONDS, taken):
        yield states
        shutil.rmtree(folder)


def states_of(stage: str, chosen: Any, settings: Resume, paths: Paths, cell: Cell | None, inputs: Iterable[Path]) -> States:
    """The same without holding them."""
    # In a copy that `dvc exp` runs in, the folder of the repository it was copied from.
    root = Path(os.environ.get("DVC_ROOT", paths.root))
    folder = root / ".resume" / f"{_name(stage, cell)}-{_fingerprint(stage, chosen, paths, cell, inputs)[:16]}"
    return States(folder, settings.steps, settings.seconds)


def _name(stage: str, cell: Cell | None) -> str:
    return f"{stage}-{cell.name}" if cell else stage


def _fingerprint(stage: str, chosen: Any, paths: Paths, cell: Cell | None, inputs: Iterable[Path]) -> str:
    files = {path.relative_to(CODE_ROOT).as_posix(): digest(path) for path in _code(stage)}
    # Another version of torch, or another number of threads, gives other bits.
    place = {
        "cell": list(cell or ()),
        "out": os.path.relpath(paths.out, paths.root),
        "torch": version("torch"),
        "numpy": version("numpy"),
        "threads": tracking.threads(),
    }
    params = plain(chosen)
    # Other processes may go on, if not to the bit.
    params.get("machine", {}).pop("processes", None)
    return fingerprint(place | {"params": params, "inputs": [digest(path) for path in inputs], "code": files})


def _code(stage: str) -> Iterator[Path]:
    for place in (*COMMON_CODE, *CODE[stage]):
        path = CODE_ROOT / place
        yield from sorted(path.rglob("*.py")) if path.is_dir() else [path]
