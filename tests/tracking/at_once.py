"""Eight processes that record at once: forks of one that has loaded what takes each of them seconds to load.

    python -m tests.tracking.at_once FOLDER EXPERIMENT STEPS

They are named 0 to 7; the exit code is how many of them failed.
"""

import importlib
import multiprocessing
import sys
from pathlib import Path

from pipeline import tracking
from pipeline.tracking import store
from tests.tracking.conftest import fill


def record(root: Path, experiment: str, name: str, steps: int) -> None:
    with tracking.start(root, key=name, resumed=False, experiment=experiment, stage="s", name=name, params={"x": name}) as run:
        fill(run, root / name, range(1, steps + 1))
        assert run.id


if __name__ == "__main__":
    store.prepare_environment()
    for name in ("rest_store", "sqlalchemy_store"):
        importlib.import_module(f"mlflow.store.tracking.{name}")
    fork, (folder, experiment, steps) = multiprocessing.get_context("fork"), sys.argv[1:]
    processes = [fork.Process(target=record, args=(Path(folder), experiment, str(i), int(steps))) for i in range(8)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    sys.exit(sum(process.exitcode != 0 for process in processes))
