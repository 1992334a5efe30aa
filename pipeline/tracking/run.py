"""One run: params, metrics, data, model, lineage, and an end that is never RUNNING."""

import json
import os
import signal
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from pipeline.config import fingerprint
from pipeline.errors import Failure
from pipeline.files import digest
from pipeline.tracking import lineage, store
from pipeline.tracking.journal import claim
from pipeline.tracking.recorded import reader

SEND_SECONDS = 2.0
BREAK_SECONDS = 30.0
IMPORT_SECONDS = 0.01
# How long the end of a run waits for its last words to be sent, and whoever asks for its id for the first answer.
END_SECONDS = 30.0


class Run:
    """Writes what it is given to a journal, and sends that from a thread. A store that fails costs a warning and a pause.

    The run that writes waits for no store, except where it asks for its `id` and where it ends, and there not for long.
    """

    def __init__(self, root: Path, key: str, resumed: bool, tags: Mapping[str, str], described: Mapping[str, Any]) -> None:
        self.root = root
        self._lost = self._warned = self._complete = False
        self._tried, self._closing = threading.Event(), threading.Event()
        try:
            self._journal = claim(store.spool(root), key, resumed)
        except OSError as error:
            elsewhere = Path(tempfile.mkdtemp(prefix="vqmoe-spool-"))
            line = f"{store.spool(root)}: cannot be used ({error.strerror}); the run writes to {elsewhere}"
            print(f"vqmoe: {line}", file=sys.stderr)
            self._journal = claim(elsewhere, key, resumed)
        # The time of now, but none before the run's last word, and from here on by a clock that does not jump.
        self._epoch = max(time.time(), self._journal.last.get("time", 0) / 1000) - time.monotonic()
        self._offline_id = self._journal.first.get("id") or f"offline-{uuid.uuid4().hex[:8]}"
        if self._journal.empty:
            self._append("create", id=self._offline_id, resumed=resumed, tags=dict(tags), **described)
        else:
            self._append("resume", tags=dict(tags))
        self._sender = store.Sender(root, self._journal)
        store.prepare_environment()
        with suppress(Exception):  # the thread meets the same error, and reports it
            import mlflow  # noqa: F401  here, since two threads that import at once can get in each other's way
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    @property
    def id(self) -> str:
        """In the store. Where that is out of reach `offline-<8 hex>`: a tag of the run, once it gets there."""
        self._tried.wait(END_SECONDS)
        return self._sender.run_id or self._offline_id

    def log(self, metrics: Mapping[str, float], step: int = 0) -> None:
        """Record metrics of a step. A metric that the run already has of this step stays as it is."""
        self._append("log", step=int(step), values={key: float(value) for key, value in metrics.items()})

    def dataset(self, name: str, path: Path, context: str, profile: Mapping[str, Any]) -> None:
        """Record a data file as the run's input, with its digest."""
        source = str(path.relative_to(self.root) if path.is_relative_to(self.root) else path)
        described = {"name": name, "source": json.dumps({"path": source}), "profile": json.dumps(profile)}
        self._append("dataset", digest=digest(path)[:32], context=context, **_clean(described))

    def upstream(self, runs: Mapping[str, str]) -> None:
        """Tag the runs whose outputs this one reads."""
        self._append("tags", tags={f"vqmoe.upstream.{stage}": run_id for stage, run_id in runs.items()})

    def artifact(self, path: Path) -> None:
        """Store a file, or the files of a folder, with the run."""
        self._append("artifact", path)

    def text(self, text: str, name: str) -> None:
        """Store a text with the run, as the file `name`."""
        self._append("text", text=store.without_credentials(text), name=name)

    def model(self, folder: Path, name: str, metrics: Mapping[str, float], step: int = 0) -> None:
        """Record a model folder (safetensors, JSON) as a logged model, its metrics linked: points at `step`, or the run's."""
        self._append("model", folder, name=name, metrics={key: float(value) for key, value in metrics.items()}, step=int(step))

    def outputs(self, paths: Iterable[Path]) -> None:
        """Tag the md5 of output files."""
        self._append("tags", tags=lineage.digests(paths, self.root, "out"))

    def end(self, status: str, error: str = "") -> None:
        if error:
            self._append("tags", tags={"vqmoe.error": store.without_credentials(error)[:5000]})
        self._append("end", status=status)
        self._closing.set()
        self._thread.join(END_SECONDS)
        if not self._complete:
            path, spool = self._journal.path, store.spool(self.root)
            there = "" if path.parent == spool else f", once the files of that folder lie in {spool}"
            line = f"what could not be recorded of run {self.id} is kept in {path}; `vqmoe track sync` sends it{there}"
            print(f"vqmoe: {line}", file=sys.stderr)

    def _append(self, what: str, kept: Path | None = None, **more: Any) -> None:
        """Write an operation, with a copy of the files that it is about."""
        try:
            if kept is not None:
                more["kept"] = self._journal.keep(kept)
            self._journal.append({"op": what, "time": int((self._epoch + time.monotonic()) * 1000)} | more)
        except OSError as error:
            if not self._lost:
                self._lost = True
                path, problem = self._journal.path, error.strerror or error
                print(f"vqmoe: {path}: cannot be written ({problem}); what it lacks of this run is lost", file=sys.stderr)

    def _work(self) -> None:
        # `vqmoe track sync` may be at it.
        self._journal.hold(wait=True)
        swept = False
        while True:
            closing, pause = self._closing.is_set(), SEND_SECONDS
            try:
                self._sender.send()
                self._tried.set()
                if not (swept or closing):
                    swept = True
                    self._sweep()
            except Exception as error:  # whatever a store, a driver or a network raises must not end a training run
                self._tried.set()
                self._warn(error)
                pause = BREAK_SECONDS
            if closing:
                break
            self._closing.wait(pause)
        with suppress(OSError):
            self._complete = self._journal.done
            self._journal.settle()
        self._journal.close()

    def _sweep(self) -> None:
        for path, problem in store.sweep(self.root, self._closing.is_set):
            if problem:
                print(f"vqmoe: {path}: cannot be sent ({problem}); `vqmoe track sync` tries again", file=sys.stderr)

    def _warn(self, error: Exception) -> None:
        if not self._warned:
            self._warned = True
            where = store.without_credentials(store.tracking_uri(self.root))
            line = f"cannot record to {where} ({store.reason(error)}); the run goes on, its metrics are kept on disk"
            print(f"vqmoe: {line}", file=sys.stderr)


@contextmanager
def start(
    root: Path,
    *,
    key: str,
    resumed: bool,
    experiment: str,
    stage: str,
    name: str,
    params: Mapping[str, Any],
    inputs: Iterable[Path] = (),
) -> Iterator[Run]:
    """A run `name` in the experiment `<experiment>/<stage>`; it ends FINISHED, FAILED or KILLED with the body.

    `key` says which run it is, in characters of file names. With `resumed` the unfinished run of that key goes on, if there
    is one; without, such a run is closed as KILLED and a new one begins.
    """
    tags = lineage.source_tags(root) | {"vqmoe.stage": stage, "vqmoe.params_fingerprint": fingerprint(params)}
    if "method" in params:
        # MLflow colours a group of runs by what it is called: by this tag methods differ, by the param vqmoe and smoe do not.
        tags["method"] = params["method"]
    described = {
        "experiment": f"{experiment}/{stage}",
        "name": name,
        "params": _clean(params),
        "diff": store.without_credentials(lineage.diff(root)),
    }
    tags |= lineage.digests(inputs, root, "in")
    with terminable():
        run = Run(root, key, resumed, _clean(tags), described)
        try:
            yield run
        except (KeyboardInterrupt, SystemExit) as stop:
            run.end("KILLED", type(stop).__name__)
            raise
        except BaseException as error:
            run.end("FAILED", f"{type(error).__name__}: {error}")
            raise
        run.end("FINISHED")


def sync(root: Path) -> None:
    """Send what runs that no longer live have left. Raises Failure where some of it cannot be sent."""
    where = store.without_credentials(store.tracking_uri(root))
    if any(store.spool(root).glob("*.jsonl")):
        try:
            store.connect(root).search_experiments(max_results=1)
        except Exception as error:
            raise Failure(f"{where}: cannot be reached ({store.reason(error)}); nothing was sent") from None
    sent = failed = 0
    for path, problem in store.sweep(root, forget=True):
        if problem:
            failed += 1
            print(f"vqmoe: {path}: cannot be sent ({problem}); mend what it names, or remove it", file=sys.stderr)
        else:
            sent += 1
            print(f"sent: {path.stem}")
    if failed:
        raise Failure(f"{where}: runs sent: {sent}, not sent: {failed}")
    print(f"{where}: runs sent: {sent}" if sent else "Nothing is left to send")


def reach(root: Path) -> tuple[str, int, str]:
    """Where runs are recorded, how many are not sent yet (those of now among them), and what is wrong there, or ""."""
    where, unsent = store.without_credentials(store.tracking_uri(root)), len(list(store.spool(root).glob("*.jsonl")))
    try:
        if client := reader(root):
            client.search_experiments(max_results=1)
    except Exception as error:  # whatever a store, a driver or a network raises
        return where, unsent, f"cannot be reached ({store.reason(error)}); runs go on and are kept on disk until it can"
    return where, unsent, ""


def _clean(values: Mapping[str, Any]) -> dict[str, str]:
    return {key: store.without_credentials(str(value)) for key, value in values.items()}


@contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM and SIGHUP (a closed terminal) leave through the normal way out, as Ctrl-C does, so that the run can be closed.

    A signal that is ignored stays ignored: `nohup` asks for that.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(signum: int, frame: FrameType | None) -> None:
        if frame is not None and frame.f_code.co_filename.startswith("<frozen importlib"):
            # An exception there may leave the lock of all imports held, for which the thread that sends would wait.
            threading.Timer(IMPORT_SECONDS, os.kill, (os.getpid(), signum)).start()
        elif signum == signal.SIGINT:
            raise KeyboardInterrupt
        else:
            raise SystemExit(128 + signum)

    ends = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    heeded = [signum for signum in ends if signal.getsignal(signum) is not signal.SIG_IGN]
    before = {signum: signal.signal(signum, leave) for signum in heeded}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
