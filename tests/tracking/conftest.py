"""Runs on an embedded store that is there already, since to make one takes seconds, and real MLflow servers."""

import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import tempfile
import time
import urllib.request
from contextlib import closing
from pathlib import Path

import pytest

from pipeline import tracking
from pipeline.tracking import run as run_module
from pipeline.tracking import store, ui
from tests.conftest import REPOSITORY

DEAD = "http://127.0.0.1:9"


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def until(condition, seconds=60):
    """Wait for a condition, and return what it gave."""
    for _ in range(seconds * 20):
        if found := condition():
            return found
        time.sleep(0.05)
    pytest.fail("what was waited for did not come")


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("made")
    store.connect(root)
    return root / ".mlflow/mlflow.db"


@pytest.fixture(scope="session")
def database(made):
    """A function that puts an empty database into a repository."""

    def put(root):
        target = root / ".mlflow/mlflow.db"
        target.parent.mkdir()
        with closing(sqlite3.connect(made)) as database:
            database.execute("VACUUM INTO ?", [str(target)])
        with closing(sqlite3.connect(target)) as database:
            database.execute("PRAGMA journal_mode=WAL")
        return root

    return put


@pytest.fixture
def root(tmp_path, database):
    """A repository with an empty database."""
    return database(tmp_path)


@pytest.fixture
def begin(root, monkeypatch):
    """A function that starts a run; after a failure it soon tries again."""
    monkeypatch.setattr(run_module, "SEND_SECONDS", 0.05)
    monkeypatch.setattr(run_module, "BREAK_SECONDS", 0.2)
    usual = {"key": "pretrain", "resumed": False, "experiment": "t", "stage": "pretrain", "name": "vqmoe-s0"}
    return lambda **more: tracking.start(root, **(usual | {"params": {"model.width": 8, "seed": 0}} | more))


class Server:
    """An MLflow server as a process of its own, which can be killed and started again."""

    def __init__(self, root):
        port = free_port()
        self.root, self.address = root, f"http://127.0.0.1:{port}"
        self._command = ui.command(root, port)
        self.start()

    def start(self):
        self.process = subprocess.Popen(
            self._command,
            cwd=REPOSITORY,
            env=os.environ | ui.SLIM,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        until(self._answers, 120)

    def kill(self):
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def _answers(self):
        try:
            return urllib.request.urlopen(f"{self.address}/health", timeout=5).read()
        except OSError:
            return None


@pytest.fixture(scope="module")
def mlflow_server(tmp_path_factory, database):
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        server = Server(database(tmp_path_factory.mktemp("server")))
    yield server
    if server.process.poll() is None:
        server.kill()


@pytest.fixture(scope="session")
def postgresql():
    """Address of an empty database of a PostgreSQL that runs as long as the tests do."""
    driver = pytest.importorskip("psycopg2", reason="there is no driver: pip install psycopg2-binary")
    # Debian leaves them out of the path.
    folders = [*os.environ["PATH"].split(":"), *sorted(map(str, Path("/usr/lib/postgresql").glob("*/bin")), reverse=True)]
    initdb, postgres = (shutil.which(name, path=":".join(folders)) for name in ("initdb", "postgres"))
    if not (initdb and postgres):
        pytest.skip("PostgreSQL is not installed")
    folder, port = tempfile.mkdtemp(prefix="vqmoe-postgresql-"), free_port()
    # It refuses to run as root.
    user = {"user": "nobody"} if os.geteuid() == 0 else {}
    if user:
        shutil.chown(folder, **user)
    usual = {"cwd": folder, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL} | user
    options = ["--username=vqmoe", "--auth=trust", "--encoding=UTF8", "--locale=C", "--no-sync"]
    subprocess.run([initdb, f"--pgdata={folder}/data", *options], check=True, **usual)
    process = subprocess.Popen(
        [postgres, "-D", f"{folder}/data", "-F", "-h", "127.0.0.1", "-p", str(port), "-k", folder], **usual
    )
    address = f"postgresql://vqmoe@127.0.0.1:{port}/postgres"

    def answers():
        try:
            driver.connect(address).close()
        except driver.OperationalError:
            return False
        return True

    until(answers)
    # Versions of SQLAlchemy differ in the driver that they take for `postgresql:`.
    yield f"postgresql+psycopg2://vqmoe@127.0.0.1:{port}/postgres"
    process.send_signal(signal.SIGINT)
    process.wait()
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def postgresql_server(tmp_path_factory, postgresql):
    """An MLflow server that records in PostgreSQL."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", postgresql)
        server = Server(tmp_path_factory.mktemp("postgresql"))
    yield server
    server.kill()


def stored(root, run_id):
    return store.connect(root).get_run(run_id)


def steps(client, run_id, key):
    return [point.step for point in client.get_metric_history(run_id, key)]


def told(client, run_id):
    """All that a store has of a run."""
    run = client.get_run(run_id)
    points = {
        key: [(point.step, point.value, point.timestamp) for point in client.get_metric_history(run_id, key)]
        for key in run.data.metrics
    }
    models = client.search_logged_models([run.info.experiment_id], f"source_run_id = '{run_id}'")
    return {
        "info": (run.info.status, run.info.run_name, run.info.start_time, run.info.end_time),
        "params": run.data.params,
        "tags": {key: value for key, value in run.data.tags.items() if key not in ("vqmoe.key", "vqmoe.offline_id")},
        "points": points,
        "datasets": [(given.dataset.name, given.dataset.digest) for given in run.inputs.dataset_inputs],
        "artifacts": sorted(file.path for file in client.list_artifacts(run_id)),
        "models": [
            (model.name, str(model.status), sorted((m.key, m.value, m.timestamp) for m in model.metrics)) for model in models
        ],
        "outputs": [output.model_id for output in run.outputs.model_outputs],
    }


def runs(client, experiment="t/pretrain"):
    found = client.get_experiment_by_name(experiment)
    return client.search_runs([found.experiment_id]) if found else []


def die(run):
    """Leave a run as a process that was killed leaves it."""
    run._closing.set()
    run._thread.join()
    run._append = lambda *arguments, **more: None
    run._complete = True


def fill(run, folder, steps=range(1, 31)):
    """Let a run record one of each."""
    folder.mkdir(exist_ok=True)
    (folder / "model.safetensors").write_text("weights")
    (folder / "table.csv").write_text("a,b")
    for step in steps:
        run.log({"train/loss": 1 / step, "train/rate": 0.1}, step)
    run.log({"test/bpc": 1.5, "cost/seconds": 2.0})
    run.upstream({"prepare": "abc"})
    run.dataset("sotu", folder / "table.csv", "training", {"tokens": 6})
    run.outputs([folder / "table.csv"])
    run.artifact(folder / "table.csv")
    run.model(folder, "pretrain-vqmoe-s0", {"test/bpc": 1.5})
