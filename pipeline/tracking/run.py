"""One run: params, metrics in batches, data, model, lineage, and an end that is never RUNNING."""

import json
import math
import signal
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.config import fingerprint
from pipeline.files import digest
from pipeline.tracking import lineage, store

FLUSH_POINTS = 1000
FLUSH_SECONDS = 2.0
BREAK_SECONDS = 30.0


class Run:
    """Sends to MLflow what it is given. A store that fails costs a warning and a pause, never the run:

    points that could not be sent are kept in a spool file, one JSON object per line.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.id = f"offline-{uuid.uuid4().hex[:8]}"
        self._points: list[dict[str, Any]] = []
        self._flushed = time.monotonic()
        self._broken_until = 0.0
        self._warned = self._lost = False
        self._client: Any = None
        self._experiment_id = ""
        self._offline = False

    def open(self, experiment: str, name: str, params: Mapping[str, Any], tags: Mapping[str, str]) -> None:
        """Create the run in the store; without one everything goes to the spool."""
        self._send(lambda: self._create(experiment, name, params, tags))
        self._offline = self.id.startswith("offline-")

    def log(self, metrics: Mapping[str, float], step: int = 0) -> None:
        """Keep metrics for the next batch; batches go out every two seconds or thousand points."""
        now = int(time.time() * 1000)
        self._points += [{"key": key, "value": float(value), "step": step, "timestamp": now} for key, value in metrics.items()]
        if len(self._points) >= FLUSH_POINTS or time.monotonic() - self._flushed >= FLUSH_SECONDS:
            self.flush()

    def dataset(self, name: str, path: Path, context: str, profile: Mapping[str, Any]) -> None:
        """Record a data file as the run's input, with its digest."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        data = Dataset(
            name=name,
            digest=digest(path)[:32],
            source_type="local",
            source=json.dumps({"path": self._name(path)}),
            profile=json.dumps(profile),
        )
        given = DatasetInput(dataset=data, tags=[InputTag("mlflow.data.context", context)])
        self._send(lambda: self._client.log_inputs(self.id, datasets=[given]))

    def upstream(self, runs: Mapping[str, str]) -> None:
        """Tag the runs whose outputs this one reads."""
        self._tags({f"vqmoe.upstream.{stage}": run_id for stage, run_id in runs.items()})

    def artifact(self, path: Path) -> None:
        """Store a file, or the files of a folder, with the run."""
        self._send(lambda: (self._client.log_artifacts if path.is_dir() else self._client.log_artifact)(self.id, str(path)))

    def model(self, folder: Path, name: str, metrics: Mapping[str, float]) -> None:
        """Record a model folder (safetensors, JSON) as a logged model, its metrics linked to it."""
        self._send(lambda: self._log_model(folder, name, metrics))

    def outputs(self, paths: Iterable[Path]) -> None:
        """Tag the md5 of output files."""
        self._tags(lineage.digests(paths, self.root, "out"))

    def flush(self) -> None:
        """Send what is kept, or spool it while the store is out of reach."""
        self._flushed = time.monotonic()
        while self._points:
            batch, self._points = self._points[:FLUSH_POINTS], self._points[FLUSH_POINTS:]
            if not self._send(lambda batch=batch: self._log_batch(batch)):
                self._spool(batch)

    def end(self, status: str, error: str = "") -> None:
        self.flush()
        if error:
            self._tags({"vqmoe.error": error[:5000]})
        self._broken_until = 0.0
        self._send(lambda: self._client.set_terminated(self.id, status))
        if self._warned and not self._lost:
            print(f"vqmoe: what could not be recorded of run {self.id} is kept in {self._spool_path()}", file=sys.stderr)

    def _create(self, experiment: str, name: str, params: Mapping[str, Any], tags: Mapping[str, str]) -> None:
        self._client = store.connect(self.root)
        self._experiment_id = store.experiment(self._client, self.root, experiment)
        from mlflow.entities import Param

        self.id = self._client.create_run(self._experiment_id, run_name=name, tags=dict(tags)).info.run_id
        self._client.log_batch(self.id, params=[Param(key, str(value)) for key, value in params.items()])
        if changes := lineage.diff(self.root):
            self._client.log_text(self.id, changes, "changes.diff")

    def _log_batch(self, points: list[dict[str, Any]]) -> None:
        from mlflow.entities import Metric

        self._client.log_batch(self.id, metrics=[Metric(**point) for point in points])

    def _log_model(self, folder: Path, name: str, metrics: Mapping[str, float]) -> None:
        from mlflow.entities import LoggedModelOutput, Metric

        model = self._client.create_logged_model(self._experiment_id, name=name, source_run_id=self.id, model_type="vqmoe")
        self._client.log_model_artifacts(model.model_id, str(folder))
        self._client.finalize_logged_model(model.model_id, "READY")
        self._client.log_outputs(self.id, [LoggedModelOutput(model.model_id, step=0)])
        now = int(time.time() * 1000)
        linked = [
            Metric(key, value, now, 0, model_id=model.model_id, run_id=self.id)
            for key, value in metrics.items()
            if math.isfinite(value)
        ]
        self._client.log_batch(self.id, metrics=linked)

    def _tags(self, tags: Mapping[str, str]) -> None:
        from mlflow.entities import RunTag

        self._send(lambda: self._client.log_batch(self.id, tags=[RunTag(key, value) for key, value in tags.items()]))

    def _send(self, call: Callable[[], Any]) -> bool:
        """Whether the call went through. After a failure nothing is tried for a while."""
        if self._offline or time.monotonic() < self._broken_until:
            return False
        try:
            call()
        except Exception as error:  # whatever a store, a driver or a network raises must not end a training run
            self._broken_until = time.monotonic() + BREAK_SECONDS
            if not self._warned:
                self._warned = True
                line = store.without_credentials(str(error).strip() or type(error).__name__).splitlines()[0]
                where = store.without_credentials(store.tracking_uri(self.root))
                print(f"vqmoe: cannot record to {where} ({line}); the run goes on, its metrics are kept on disk", file=sys.stderr)
            return False
        return True

    def _spool(self, points: list[dict[str, Any]]) -> None:
        path = self._spool_path()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "a", encoding="utf-8") as file:
                file.writelines(json.dumps({"run_id": self.id} | point) + "\n" for point in points)
        except OSError as error:
            if not self._lost:
                self._lost = True
                print(f"vqmoe: {path}: cannot be written ({error.strerror}); metrics of this run are lost", file=sys.stderr)

    def _spool_path(self) -> Path:
        return store.folder(self.root) / "spool" / f"{self.id}.jsonl"

    def _name(self, path: Path) -> str:
        return str(path.relative_to(self.root) if path.is_relative_to(self.root) else path)


@contextmanager
def start(
    root: Path, *, experiment: str, stage: str, name: str, params: Mapping[str, Any], inputs: Iterable[Path] = ()
) -> Iterator[Run]:
    """A run `name` in the experiment `<experiment>/<stage>`; it ends FINISHED, FAILED or KILLED with the body."""
    tags = lineage.source_tags(root) | {"vqmoe.stage": stage, "vqmoe.params_fingerprint": fingerprint(params)}
    tags |= lineage.digests(inputs, root, "in")
    run = Run(root)
    with terminable():
        try:
            run.open(f"{experiment}/{stage}", name, params, tags)
            yield run
        except (KeyboardInterrupt, SystemExit) as stop:
            run.end("KILLED", type(stop).__name__)
            raise
        except BaseException as error:
            run.end("FAILED", store.without_credentials(f"{type(error).__name__}: {error}"))
            raise
        run.end("FINISHED")


@contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM and SIGHUP (a closed terminal) leave through the normal way out, so that the run can be closed.

    A signal that is ignored stays ignored: `nohup` asks for that.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(signum: int, frame: object) -> None:
        raise SystemExit(128 + signum)

    heeded = [signum for signum in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(signum) is not signal.SIG_IGN]
    before = {signum: signal.signal(signum, leave) for signum in heeded}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
