import signal
import socket
import subprocess
import sys
import time
import urllib.request

import pytest

from pipeline import tracking
from pipeline.errors import Failure, UsageError
from pipeline.tracking import store
from tests.conftest import REPOSITORY


def _free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_a_taken_port_is_named(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UsageError, match=f"port {port} is taken; name another with --port"):
            tracking.serve(tmp_path, port)


def test_a_store_that_is_no_folder_is_named(tmp_path):
    (tmp_path / ".mlflow").write_text("")
    with pytest.raises(Failure, match=r"\.mlflow: cannot be used .*it has to be a writable folder"):
        tracking.serve(tmp_path, _free_port())


def test_a_server_of_its_own_is_pointed_to(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:secret@mlflow.example.org")
    tracking.serve(tmp_path, 1)
    printed = capsys.readouterr().out
    assert "open https://mlflow.example.org" in printed


@pytest.fixture
def server(tmp_path):
    """`vqmoe ui` as a process, once its pages are there, and its address."""
    port = _free_port()
    address = f"http://127.0.0.1:{port}"
    code = f"import pathlib; from pipeline.tracking import serve; serve(pathlib.Path({str(tmp_path)!r}), {port})"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(240):
            try:
                assert b"MLflow" in urllib.request.urlopen(address, timeout=5).read()
                break
            except OSError:
                time.sleep(0.5)
        else:
            pytest.fail("the server did not start")
        yield process, address
    finally:
        process.terminate()
        process.wait(60)


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_server_leaves_no_process_behind(server, sent):
    process, address = server
    process.send_signal(sent)
    process.wait(60)
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(address, timeout=5)


def test_the_pages_are_served_and_a_server_that_dies_mid_run_loses_nothing(server, tmp_path, monkeypatch, capsys):
    """A real server takes runs over HTTP; then it dies, and the run goes on into the spool."""
    process, address = server
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with tracking.start(tmp_path, experiment="t", stage="s", name="over-http", params={}) as run:
        run.log({"a": 1.0}, 1)
        run.flush()
        process.terminate()
        process.wait(60)
        run.log({"a": 2.0}, 2)
    spooled = (tmp_path / ".mlflow/spool" / f"{run.id}.jsonl").read_text()
    assert '"step": 2' in spooled
    assert '"step": 1' not in spooled
    assert "cannot record" in capsys.readouterr().err
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    history = store.connect(tmp_path).get_metric_history(run.id, "a")
    assert [(point.step, point.value) for point in history] == [(1, 1.0)]
