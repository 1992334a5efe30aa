"""Runs that are recorded by a real MLflow server: one that is killed, one that is slow, one that asks for a password."""

import http.server
import json
import shutil
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

import pytest

from pipeline import tracking
from pipeline.files import read_json
from pipeline.tracking import run as run_module
from pipeline.tracking import store
from tests.conftest import REPOSITORY
from tests.stages import repository
from tests.tracking.conftest import DEAD, Server, fill, runs, steps, told, until

DELAY = 0.25


class _Slow(http.server.BaseHTTPRequestHandler):
    """Hands requests on to the server, each after DELAY seconds."""

    def _hand_on(self):
        time.sleep(DELAY)
        self.server.requests += 1
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        headers = {"Content-Type": self.headers.get("Content-Type", "application/json")}
        request = urllib.request.Request(self.server.target + self.path, body or None, headers, method=self.command)
        try:
            answer = urllib.request.urlopen(request, timeout=30)
        except urllib.error.HTTPError as error:
            answer = error
        content = answer.read()
        self.send_response(answer.status)
        self.send_header("Content-Type", answer.headers.get("Content-Type", "application/json"))
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _hand_on

    def log_message(self, *arguments):
        pass


@pytest.fixture
def slow_server(mlflow_server):
    proxy = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Slow)
    proxy.target, proxy.requests = mlflow_server.address, 0
    proxy.address = f"http://127.0.0.1:{proxy.server_port}"
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    yield proxy
    proxy.shutdown()
    proxy.server_close()


def test_a_server_that_is_killed_mid_run_and_comes_back_has_each_step_once(root, begin, monkeypatch, capsys):
    server = Server(root)
    try:
        with monkeypatch.context() as there:
            there.setenv("MLFLOW_TRACKING_URI", server.address)
            with begin() as run:
                for step in range(1, 2001):
                    run.log({"a": step, "b": -step}, step)
                    if step == 500:
                        until(lambda: run._sender.run_id)
                    if step == 1000:
                        server.kill()
                for step in range(2001, 2501):
                    run.log({"a": step, "b": -step}, step)
                until(lambda: "cannot record" in capsys.readouterr().err)
                server.start()
                for step in range(2501, 3001):
                    run.log({"a": step, "b": -step}, step)
                run_id = run.id
        client = store.connect(root)
        assert [(one.info.run_id, one.info.status) for one in runs(client)] == [(run_id, "FINISHED")]
        assert steps(client, run_id, "a") == steps(client, run_id, "b") == list(range(1, 3001))
        assert not list((root / ".mlflow/spool").iterdir())
    finally:
        server.kill()


@pytest.fixture(params=["mlflow_server", "postgresql_server"])
def either_server(request):
    return request.getfixturevalue(request.param)


def test_what_a_server_is_sent_again_stands_there_once(tmp_path, either_server, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", DEAD)
    with tracking.start(tmp_path, key="k", resumed=False, experiment="again", stage="s", name="n", params={"x": 1}) as run:
        fill(run, tmp_path / "model")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", either_server.address)
    spool, kept = tmp_path / ".mlflow/spool", tmp_path / "kept"
    shutil.copytree(spool, kept)
    tracking.sync(tmp_path)
    client = store.connect(tmp_path)
    (found,) = runs(client, "again/s")
    once = told(client, found.info.run_id)
    assert [point[0] for point in once["points"]["train/loss"]] == list(range(1, 31))
    assert [model[:2] for model in once["models"]] == [("pretrain-vqmoe-s0", "READY")]
    assert (once["info"][0], once["artifacts"], once["params"]) == ("FINISHED", ["table.csv"], {"x": "1"})
    shutil.rmtree(spool)
    shutil.copytree(kept, spool)
    tracking.sync(tmp_path)
    assert [one.info.run_id for one in runs(client, "again/s")] == [found.info.run_id]
    assert told(client, found.info.run_id) == once


def test_eight_processes_record_through_a_server_to_postgresql_at_once(tmp_path, postgresql_server, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", postgresql_server.address)
    command = [sys.executable, "-m", "tests.tracking.at_once", str(tmp_path), "eight", "500"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0 and "cannot record" not in done.stderr, done.stderr
    tracking.sync(tmp_path)
    client = store.connect(tmp_path)
    found = {run.info.run_name: told(client, run.info.run_id) for run in runs(client, "eight/s")}
    assert found.keys() == {str(i) for i in range(8)} and len(runs(client, "eight/s")) == 8
    for name, run in found.items():
        assert (run["info"][0], run["params"], run["artifacts"]) == ("FINISHED", {"x": name}, ["table.csv"])
        assert [point[0] for point in run["points"]["train/loss"]] == list(range(1, 501))
        assert [model[:2] for model in run["models"]] == [("pretrain-vqmoe-s0", "READY")]


@pytest.mark.parametrize("through", ["database", "server"])
def test_a_point_that_comes_twice_is_stored_once(root, mlflow_server, monkeypatch, through):
    """What sending relies on where a request comes through after it was given up."""
    if through == "server":
        monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server.address)
    from mlflow.entities import Metric

    client = store.connect(root)
    run_id = client.create_run("0").info.run_id
    points = [Metric("a", value, 1_700_000_000_000 + step, step) for step, value in enumerate([0.1, 1e300, float("nan")])]
    for _ in range(2):
        client.log_batch(run_id, metrics=points)
    assert steps(client, run_id, "a") == [0, 1, 2]


def test_a_slow_server_does_not_slow_the_run(tmp_path, slow_server, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", slow_server.address)
    monkeypatch.setattr(run_module, "SEND_SECONDS", 0.05)
    with tracking.start(tmp_path, key="k", resumed=False, experiment="slow", stage="s", name="n", params={}) as run:
        until(lambda: slow_server.requests)
        started = time.monotonic()
        for step in range(500):
            run.log({"a": step}, step)
        run.upstream({"prepare": "x"})
        # Hundreds of calls take less than one request, of which there are many.
        assert time.monotonic() - started < DELAY
    assert slow_server.requests > 8
    assert steps(store.connect(tmp_path), run.id, "a") == list(range(500))


def test_machines_that_share_cache_and_server_train_each_cell_once(tmp_path, mlflow_server, warm):
    """Clones stand for them; they share no lock, no .dvc/tmp, no .mlflow."""
    origin, cache = repository.make(tmp_path / "origin"), tmp_path / "cache"
    cells, made = ("vqmoe", "smoe"), {}

    def machine(name):
        root = tmp_path / name
        repository.git(tmp_path, "clone", str(origin), str(root))
        shutil.copytree(origin / "data", root / "data")
        dvc(root, "cache", "dir", "--local", str(cache))
        return root

    def dvc(root, *arguments):
        process = repository.start(root, "dvc", *arguments, warm=warm, MLFLOW_TRACKING_URI=mlflow_server.address)
        printed, _ = process.communicate()
        assert process.returncode == 0, printed
        return printed

    for cell in cells:
        dvc(root := machine(cell), "repro", f"pretrain@{cell}-0")
        made[cell] = root / f"results/pretrain/{cell}-s0.json"
    last = machine("last")
    assert "Running stage" not in dvc(last, "repro", *(f"pretrain@{cell}-0" for cell in cells))
    for cell, result in made.items():
        assert (last / f"results/pretrain/{cell}-s0.json").read_bytes() == result.read_bytes()
    from mlflow import MlflowClient

    client = MlflowClient(mlflow_server.address)
    assert len(runs(client, "vqmoe/prepare")) == 1
    recorded = {run.info.run_name: run.info.run_id for run in runs(client, "vqmoe/pretrain")}
    assert recorded == {f"{cell}-s0": read_json(result, "")["run_id"] for cell, result in made.items()}


SECRETS = ("pass%2Fword-1", "pass/word-1", "word-2", "token-3")


@pytest.fixture
def credentials(tmp_path, monkeypatch):
    """A function from a server to its address with credentials, which also stand in the environment and in changed files."""

    def given(address):
        uri = address.replace("//", "//someone:pass%2Fword-1@")
        for name, value in (("URI", uri), ("USERNAME", "someone"), ("PASSWORD", "word-2"), ("TOKEN", "token-3")):
            monkeypatch.setenv(f"MLFLOW_TRACKING_{name}", value)
        (tmp_path / "script.sh").write_text("#!/bin/sh\n")
        for arguments in (["init"], ["add", "script.sh"], ["commit", "-m", "first"]):
            command = ["git", "-c", "user.name=t", "-c", "user.email=t@t", *arguments]
            subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
        (tmp_path / "script.sh").write_text(f"export MLFLOW_TRACKING_URI={uri}\nexport MLFLOW_TRACKING_TOKEN=token-3\n")
        return {"data.corpus": uri, "x": "word-2"}

    return given


def _start(root, params):
    return tracking.start(root, key="k", resumed=False, experiment="secret", stage="s", name="n", params=params)


def _found_in(*folders):
    texts = b"".join(path.read_bytes() for folder in folders for path in folder.rglob("*") if path.is_file())
    assert b"MLFLOW_TRACKING_URI=http://127.0.0.1" in texts  # the file that had the secret was looked at
    return [secret for secret in SECRETS if secret.encode() in texts]


def test_credentials_reach_neither_journal_nor_messages(tmp_path, credentials, capsys):
    params = credentials(DEAD)
    with pytest.raises(ValueError, match="token-3"), _start(tmp_path, params) as run:
        run.upstream({"prepare": "x"})
        raise ValueError(f"{params['data.corpus']} does not like token-3")
    assert _found_in(tmp_path / ".mlflow") == []
    printed = capsys.readouterr().err
    assert "cannot record to http://127.0.0.1:9" in printed
    assert not [secret for secret in SECRETS if secret in printed]
    lines = (tmp_path / ".mlflow/spool/k.jsonl").read_text().splitlines()
    assert json.loads(lines[0])["params"] == {"data.corpus": "http://127.0.0.1:9", "x": "***"}


def test_credentials_reach_neither_store_nor_artifacts(tmp_path, mlflow_server, credentials, capsys):
    params = credentials(mlflow_server.address)
    with pytest.raises(ValueError, match="token-3"), _start(tmp_path, params) as run:
        fill(run, tmp_path / "model")
        raise ValueError(f"{params['data.corpus']} does not like token-3")
    assert not run.id.startswith("offline-")
    client = store.connect(tmp_path)
    assert told(client, run.id)["artifacts"] == ["changes.diff", "table.csv"]
    assert _found_in(mlflow_server.root, tmp_path / ".mlflow") == []
    assert not [secret for secret in SECRETS if secret in capsys.readouterr().err]


def test_the_pages_of_a_server_are_those_of_the_runs(tmp_path, mlflow_server, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"{mlflow_server.address}/")
    tracking.serve(tmp_path, 1, "shown")
    with tracking.start(tmp_path, key="k", resumed=False, experiment="shown", stage="pretrain", name="n", params={}):
        pass
    tracking.serve(tmp_path, 1, "shown")
    first, second = (line for line in capsys.readouterr().out.splitlines() if line.startswith("Runs are recorded"))
    assert first.endswith(f"open {mlflow_server.address}/")
    found = store.connect(tmp_path).get_experiment_by_name("shown/pretrain")
    assert f"open {mlflow_server.address}/#/experiments/{found.experiment_id}/runs?" in second
    # Others use it too, perhaps in another version: it gets no view.
    assert not found.tags and "viewStateShareKey" not in second
