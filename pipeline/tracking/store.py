"""Where runs are recorded: the server of MLFLOW_TRACKING_URI, or an embedded SQLite database under the repository."""

import os
import re
import sqlite3
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock

if TYPE_CHECKING:
    from mlflow import MlflowClient

# Set before mlflow is imported: no calls home, and a dead server costs seconds instead of minutes.
ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    "MLFLOW_ENABLE_ASYNC_LOGGING": "false",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
}


def folder(root: Path) -> Path:
    """Folder of the embedded store. In a copy that `dvc exp` runs in, that of the repository it was copied from."""
    return Path(os.environ.get("DVC_ROOT", root)).resolve() / ".mlflow"


def tracking_uri(root: Path) -> str:
    """MLFLOW_TRACKING_URI if set, else the embedded database by its absolute path."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{folder(root) / 'mlflow.db'}"


def without_credentials(text: str) -> str:
    """A text, user and password cut out of any URL in it."""
    return re.sub(r"(\w+://)[^/@\s]+@", r"\1", text)


def prepare_environment() -> None:
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def connect(root: Path) -> "MlflowClient":
    """A client of the store. The embedded database is made first, by one process at a time."""
    prepare_environment()
    uri = tracking_uri(root)
    if uri == f"sqlite:///{folder(root) / 'mlflow.db'}":
        _create(root, uri)
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri)


def experiment(client: "MlflowClient", root: Path, name: str) -> str:
    """Id of an experiment, made if there is none. Embedded: its artifacts lie beside the database."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        embedded = tracking_uri(root).startswith("sqlite:")
        try:
            return client.create_experiment(name, artifact_location=(folder(root) / "artifacts").as_uri() if embedded else None)
        except MlflowException:  # another process made it in between
            found = client.get_experiment_by_name(name)
            if found is None:
                raise
    return found.experiment_id


def _create(root: Path, uri: str) -> None:
    path = folder(root) / "mlflow.db"
    path.parent.mkdir(parents=True, exist_ok=True)
    # Several processes that initialise one empty database crash each other: the first makes it, the others wait.
    with FileLock(path.with_suffix(".lock")):
        if path.exists() and path.stat().st_size:
            return
        from mlflow import MlflowClient

        MlflowClient(tracking_uri=uri).search_experiments(max_results=1)
        with sqlite3.connect(path) as database:
            # Write-ahead logging, remembered in the file: readers do not wait for writers, and a write costs a quarter.
            database.execute("PRAGMA journal_mode=WAL")
        database.close()
