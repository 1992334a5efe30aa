import signal
import socket
import subprocess
import sys
import urllib.request

import pytest

from pipeline import tracking
from pipeline.errors import Failure, UsageError
from tests.conftest import REPOSITORY
from tests.tracking.conftest import free_port


def test_a_taken_port_is_named(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UsageError, match=f"port {port} is taken; name another with --port"):
            tracking.serve(tmp_path, port, "vqmoe")


def test_a_store_that_is_no_folder_is_named(tmp_path):
    (tmp_path / ".mlflow").write_text("")
    with pytest.raises(Failure, match=r"\.mlflow: cannot be used .*it has to be a writable folder"):
        tracking.serve(tmp_path, free_port(), "vqmoe")


def test_a_server_of_its_own_is_pointed_to(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:secret@mlflow.example.org")
    tracking.serve(tmp_path, 1, "vqmoe")
    printed = capsys.readouterr().out
    assert "open https://mlflow.example.org/\n" in printed


def test_a_database_that_is_none_is_named(root):
    (root / ".mlflow/mlflow.db").write_bytes(b"no database " * 100)
    with pytest.raises(Failure, match=r"sqlite:///.*mlflow\.db: runs cannot be read there \(.*not a database"):
        tracking.serve(root, free_port(), "vqmoe")


@pytest.fixture
def server(root):
    """`vqmoe ui` as a process, its address, and what it printed until its pages are there."""
    port = free_port()
    code = f"import pathlib; from pipeline.tracking import serve; serve(pathlib.Path({str(root)!r}), {port}, 'vqmoe')"
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        printed = []
        while not printed or not printed[-1].startswith("MLflow: "):
            printed.append(process.stdout.readline())
            assert printed[-1], "the server did not start"
        yield process, f"http://127.0.0.1:{port}", printed
    finally:
        process.terminate()
        process.wait(60)


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_the_server_listens_here_alone_and_stopped_leaves_no_process_behind(server, sent):
    process, address, printed = server
    # Where there are no runs it says so, and shows them once they come.
    assert printed == ["There are no runs of vqmoe yet: run `dvc repro` first\n", f"MLflow: {address}/ (Ctrl-C stops it)\n"]
    assert b"MLflow" in urllib.request.urlopen(address, timeout=60).read()
    # Another address of this machine: who listens everywhere would answer there.
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(address.replace("127.0.0.1", "127.0.0.2"), timeout=5)
    process.send_signal(sent)
    process.wait(60)
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(address, timeout=5)
