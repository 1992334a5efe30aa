"""Where runs are recorded: the server of MLFLOW_TRACKING_URI, or an embedded SQLite database under the repository."""

import logging
import math
import os
import platform
import re
import sqlite3
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from filelock import FileLock

from pipeline.errors import Failure
from pipeline.files import output_file
from pipeline.tracking import pyfunc
from pipeline.tracking.journal import Journal, Sent

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

# Points in a request, and tags or params: MLflow takes no more.
BATCH_POINTS, BATCH_TAGS = 1000, 100

# Set before mlflow is imported: no calls home, and a dead server costs seconds instead of minutes. A request is not repeated
# unseen: it may have come through, and what makes a run or a model has to look for it first.
ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_ENABLE_ASYNC_LOGGING": "false",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}
SECRETS = ("MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN")

# The file that MLflow has open for each address of the embedded database.
_opened: dict[str, tuple[int, int] | None] = {}


def folder(root: Path) -> Path:
    """Folder of the embedded store. In a copy that `dvc exp` runs in, that of the repository it was copied from."""
    return Path(os.environ.get("DVC_ROOT", root)).resolve() / ".mlflow"


def spool(root: Path) -> Path:
    """Folder of the journals."""
    return folder(root) / "spool"


def embedded_uri(root: Path) -> str:
    """The embedded database by its absolute path."""
    return f"sqlite:///{folder(root) / 'mlflow.db'}"


def tracking_uri(root: Path) -> str:
    """MLFLOW_TRACKING_URI if set, else the embedded database."""
    return os.environ.get("MLFLOW_TRACKING_URI") or embedded_uri(root)


def without_credentials(text: str) -> str:
    """A text, user and password cut out of any URL in it, and the credentials of the environment wherever they are a word."""
    # Up to the last @, since a password may have a / that nobody has percent-encoded; a path of sqlite:// has no credentials.
    credentials = os.environ.get("MLFLOW_TRACKING_URI", "").partition("://")[2].rpartition("@")[0]
    if credentials.startswith("/"):
        credentials = ""
    if credentials:
        # Or what a URL's parser takes for its path.
        for part in (credentials, credentials.partition("/")[2]):
            text = text.replace(f"{part}@", "") if part else text
    text = re.sub(r"(\w+://)[^/\s\"'<>]*@", r"\1", text)
    password = credentials.partition(":")[2]
    for secret in (password, unquote(password), *(os.environ.get(name) for name in SECRETS)):
        text = re.sub(rf"(?<!\w){re.escape(secret)}(?!\w)", "***", text) if secret else text
    return text


def reason(error: BaseException) -> str:
    """An error, or what caused it, as part of a line."""
    while error.__cause__:
        error = error.__cause__
    return without_credentials(str(error).strip() or type(error).__name__).splitlines()[0]


def prepare_environment() -> None:
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def connect(root: Path) -> "MlflowClient":
    """A client of the store. The embedded database is made first, by one process at a time."""
    prepare_environment()
    from mlflow import MlflowClient

    # What goes wrong is told in one line by who calls, and not in a traceback by these.
    for name in ("mlflow", "urllib3"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    uri, path = tracking_uri(root), _database(root)
    if uri != embedded_uri(root):
        _well_formed(uri)
        return MlflowClient(tracking_uri=uri)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Several processes that initialise one empty database crash each other: the first makes it, the others wait.
    with FileLock(path.with_suffix(".lock")):
        if not path.exists() or not path.stat().st_size:
            _make(path)
        # MLflow keeps a file open that has been deleted or replaced; another spelling of its path opens the new one.
        while _opened.setdefault(uri, database_file(root)) != database_file(root):
            uri = f"{uri.removesuffix(path.name)}./{path.name}"
        return MlflowClient(tracking_uri=uri)


def _well_formed(uri: str) -> None:
    """Raises Failure if it cannot be taken apart. What others say of such a URI quotes pieces of the password."""
    try:
        urlsplit(uri).port  # noqa: B018  it is looked at where it is asked for
    except ValueError:
        rules = "its port has to be digits, an IPv6 host in [], and /?#[]@ in user and password percent-encoded"
        raise Failure(f"it is no URL: {rules}") from None


def _make(path: Path) -> None:
    """The embedded database, whole or not at all: of one with some of its tables MLflow neither makes the rest nor uses it."""
    from mlflow import MlflowClient

    with tempfile.TemporaryDirectory() as folder, output_file(path) as whole:
        MlflowClient(tracking_uri=f"sqlite:///{folder}/made.db").search_experiments(max_results=1)
        # A copy, since MLflow keeps the one that it has made open.
        with closing(sqlite3.connect(f"{folder}/made.db")) as database:
            database.execute("VACUUM INTO ?", [str(whole)])
        with closing(sqlite3.connect(whole)) as database:
            # Write-ahead logging, remembered in the file: readers do not wait for writers, and a write costs a quarter.
            database.execute("PRAGMA journal_mode=WAL")
        for left in ("-wal", "-shm"):  # of one that was deleted: they would be taken for this one's
            path.with_name(f"{path.name}{left}").unlink(missing_ok=True)


def database_file(root: Path) -> tuple[int, int] | None:
    """Which file the embedded database is; None where there is none, or another store."""
    if tracking_uri(root) != embedded_uri(root):
        return None
    try:
        found = _database(root).stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def experiment_named(client: "MlflowClient", root: Path, name: str) -> str:
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


class Sender:
    """Sends what a journal holds to MLflow, in order, and marks how far it came. Whatever is sent again stands there once.

    Its methods raise whatever a store, a driver or a network raises.
    """

    def __init__(self, root: Path, journal: Journal) -> None:
        self._root = root
        self._journal = journal
        self._sent = journal.sent()
        self._client: Any = None

    @property
    def run_id(self) -> str:
        """The run in the store; "" as long as there is none."""
        return self._sent.run_id

    def send(self, stop: Callable[[], bool] = lambda: False) -> None:
        """Send what is left, or less if `stop` says so."""
        self._journal.flush()
        try:
            try:
                self._send(stop)
            except Exception as error:
                if not isinstance(error, Replaced) and getattr(error, "error_code", "") != "RESOURCE_DOES_NOT_EXIST":
                    raise
                # The run, or the whole store, is no longer there: all of it goes into a new one.
                self._client = None
                self._journal.mark(Sent())
                self._send(stop)
        except BaseException:
            self._client = None
            raise

    def _send(self, stop: Callable[[], bool]) -> None:
        if self._client is None:
            self._connect()
        points: list[Any] = []
        behind = start = self._sent.offset
        for behind, operation in self._journal.operations(start):
            what = operation.pop("op")
            if what == "log":
                points += self._new(**operation)
            if points and (what != "log" or len(points) >= BATCH_POINTS):
                self._log(points)
                points = []
            if what != "log":
                getattr(self, f"_{what}")(**operation)
            if not points:
                self._mark(behind)
                if stop():
                    return
        if points:
            self._log(points)
            self._mark(behind)

    def _connect(self) -> None:
        client = connect(self._root)
        self._file = database_file(self._root)
        self._sent = self._journal.sent()
        self._client = client
        if self._sent.run_id:
            self._attach(client.get_run(self._sent.run_id))

    def _attach(self, run: "Run") -> None:
        """Go on with a run: the steps it has of each metric are known from the store, and so is when they were logged."""
        self._run_id, self._experiment_id = run.info.run_id, run.info.experiment_id
        self._steps: dict[str, dict[int, int]] = {
            key: {point.step: point.timestamp for point in self._client.get_metric_history(self._run_id, key)}
            for key in run.data.metrics
        }

    def _mark(self, offset: int) -> None:
        if database_file(self._root) != self._file:
            raise Replaced("the database was removed or replaced")
        self._sent = Sent(self._run_id, offset)
        self._journal.mark(self._sent)

    def _create(
        self,
        *,
        time: int,
        id: str,
        experiment: str,
        name: str,
        tags: dict[str, str],
        params: dict[str, str],
        diff: str,
        resumed: bool,
    ) -> None:
        from mlflow.entities import Param

        experiment_id = experiment_named(self._client, self._root, experiment)
        own = {
            "vqmoe.key": self._journal.path.stem,
            "vqmoe.offline_id": id,
            "vqmoe.spool": f"{platform.node()}:{self._journal.path.parent}",
        }
        found = self._tagged(experiment_id, "vqmoe.offline_id", id)
        if not found:
            # Those of other machines and clones may live.
            unfinished = [
                run
                for run in self._tagged(experiment_id, "vqmoe.key", own["vqmoe.key"])
                if run.info.status != "FINISHED" and run.data.tags.get("vqmoe.spool") == own["vqmoe.spool"]
            ]
            found = unfinished[:1] if resumed else []
            for run in unfinished[len(found) :]:
                if run.info.status == "RUNNING":
                    self._client.set_terminated(run.info.run_id, "KILLED")
                aside = f"{own['vqmoe.key']}~{run.data.tags['vqmoe.offline_id']}"
                self._client.set_tag(run.info.run_id, "vqmoe.key", aside)
        if found:
            (run, *_) = found
        else:
            run = self._client.create_run(experiment_id, start_time=time, tags=own, run_name=name)
        self._attach(run)
        self._resume(time=time, tags=tags | own)
        new = [Param(key, value) for key, value in params.items() if key not in run.data.params]
        for start in range(0, len(new), BATCH_TAGS):
            self._client.log_batch(self._run_id, params=new[start : start + BATCH_TAGS])
        if diff:
            self._client.log_text(self._run_id, diff, "changes.diff")

    def _resume(self, *, time: int, tags: dict[str, str]) -> None:
        self._client.update_run(self._run_id, status="RUNNING")
        if "vqmoe.error" in self._client.get_run(self._run_id).data.tags:
            self._client.delete_tag(self._run_id, "vqmoe.error")
        self._tags(time=time, tags=tags)

    def _new(self, *, time: int, step: int, values: dict[str, float]) -> list[Any]:
        """The points of steps that the run does not have: one that goes on repeats some."""
        from mlflow.entities import Metric

        points = []
        for key, value in values.items():
            steps = self._steps.setdefault(key, {})
            if step not in steps:
                steps[step] = time
                points.append(Metric(key, value, time, step))
        return points

    def _log(self, points: list[Any]) -> None:
        for start in range(0, len(points), BATCH_POINTS):
            self._client.log_batch(self._run_id, metrics=points[start : start + BATCH_POINTS])

    def _tags(self, *, time: int, tags: dict[str, str]) -> None:
        from mlflow.entities import RunTag

        new = [RunTag(key, value) for key, value in tags.items()]
        for start in range(0, len(new), BATCH_TAGS):
            self._client.log_batch(self._run_id, tags=new[start : start + BATCH_TAGS])

    def _dataset(self, *, time: int, context: str, **dataset: str) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag
        from mlflow.exceptions import MlflowException

        given = DatasetInput(dataset=Dataset(source_type="local", **dataset), tags=[InputTag("mlflow.data.context", context)])
        try:
            self._client.log_inputs(self._run_id, datasets=[given])
        except MlflowException as error:
            # Another process made the same dataset in between, perhaps; then it is there now.
            if error.error_code != "BAD_REQUEST":
                raise
            self._client.log_inputs(self._run_id, datasets=[given])

    def _artifact(self, *, time: int, kept: str) -> None:
        if path := self._kept(kept):
            (self._client.log_artifacts if path.is_dir() else self._client.log_artifact)(self._run_id, str(path))

    def _text(self, *, time: int, text: str, name: str) -> None:
        self._client.log_text(self._run_id, text, name)

    def _model(self, *, time: int, kept: str, name: str, metrics: dict[str, float], step: int = 0) -> None:
        from mlflow.entities import LoggedModelOutput, Metric

        found = self._client.search_logged_models(
            [self._experiment_id], f"name = '{name}' AND source_run_id = '{self._run_id}'", max_results=1
        )
        model, run = found[0] if found else None, self._client.get_run(self._run_id)
        if model is None or str(model.status) != "READY":
            folder = self._kept(kept)
            if folder is None:
                return
            model = model or self._client.create_logged_model(
                self._experiment_id,
                name=name,
                source_run_id=self._run_id,
                model_type="vqmoe",
                params=run.data.params,
            )
            pyfunc.describe(folder, model.model_id, run.data.tags)
            self._client.log_model_artifacts(model.model_id, str(folder))
            self._client.finalize_logged_model(model.model_id, "READY")
        if run.outputs is None or model.model_id not in {output.model_id for output in run.outputs.model_outputs}:
            self._client.log_outputs(self._run_id, [LoggedModelOutput(model.model_id, step)])
        # A metric of the run that is linked has to be the same point, or it would stand there twice.
        data, linked = {given.tags[0].value: given.dataset for given in run.inputs.dataset_inputs}, []
        for key, value in metrics.items():
            if math.isfinite(value):
                steps = self._steps.setdefault(key, {})
                at = step if step in steps else 0
                given = {"model_id": model.model_id, "run_id": self._run_id}
                # The data that the run has for what the name begins with, or the only ones there are.
                if scored_on := data.get(key.partition("/")[0]) or (next(iter(data.values())) if len(data) == 1 else None):
                    given |= {"dataset_name": scored_on.name, "dataset_digest": scored_on.digest}
                linked.append(Metric(key, value, steps.setdefault(at, time), at, **given))
        self._log(linked)

    def _end(self, *, time: int, status: str, superseded: bool = False) -> None:
        self._client.set_terminated(self._run_id, status, end_time=time)

    def _damaged(self, *, at: int) -> None:
        raise Failure(f"damaged at byte {at}")

    def _tagged(self, experiment_id: str, tag: str, value: str) -> "list[Run]":
        """Runs with a tag, the last first."""
        return list(self._client.search_runs([experiment_id], f"tags.`{tag}` = '{value}'"))

    def _kept(self, name: str) -> Path | None:
        path = self._journal.kept(name)
        if path.exists():
            return path
        print(f"vqmoe: {path}: removed before it was sent; run {self._run_id} lacks it", file=sys.stderr)
        return None


class Replaced(Exception):
    """The database that was written to is not the one that is there."""


def sweep(root: Path, stop: Callable[[], bool] = lambda: False, forget: bool = False) -> Iterator[tuple[Path, str]]:
    """Send what runs that no longer live have left, each journal on its own: its path, and "" or why it could not be sent.

    A run that died without an end is closed as KILLED. `forget` also removes the journals of runs that might go on.
    """
    for path in sorted(spool(root).glob("*.jsonl")):
        if stop():
            return
        try:
            journal = Journal.open(path)
        except OSError as error:
            yield path, reason(error)
            continue
        if journal is None:
            continue
        try:
            if journal.unreadable:
                raise Failure("none of its lines can be read")
            if not (journal.empty or journal.ended):
                journal.close_dead()
            if journal.empty or journal.done:
                journal.settle(forget)
            elif journal.share():
                Sender(root, journal).send(stop)
                if journal.done:
                    yield path, ""
                if journal.hold(wait=False):
                    journal.settle(forget)
        except Exception as error:  # whatever ails one journal must not keep the others back
            yield path, reason(error)
        finally:
            journal.close()


def _database(root: Path) -> Path:
    return folder(root) / "mlflow.db"
