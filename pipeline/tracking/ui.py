"""The MLflow pages, served from this machine to this machine."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

from pipeline.errors import Failure, UsageError
from pipeline.tracking import store
from pipeline.tracking.run import terminable

# One worker and no job runner: starts in seconds and takes a sixth of the memory of the default server.
SLIM = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}


def serve(root: Path, port: int) -> None:
    """Run the server on 127.0.0.1 until interrupted. A server named by MLFLOW_TRACKING_URI is pointed to instead."""
    uri = store.tracking_uri(root)
    if uri.startswith("http"):
        print(f"Runs are recorded by a server of their own; open {store.without_credentials(uri)}")
        return
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            raise UsageError(f"port {port} is taken; name another with --port") from None
    try:
        store.connect(root)
    except OSError as error:
        raise Failure(f"{store.folder(root)}: cannot be used ({error.strerror}); it has to be a writable folder") from None
    print(f"MLflow: http://127.0.0.1:{port} (Ctrl-C stops it)", flush=True)
    # A session of its own, so that all of its processes can be stopped together.
    server = subprocess.Popen(command(root, port), env=os.environ | SLIM, start_new_session=True)
    try:
        with terminable():
            code = server.wait()
    except KeyboardInterrupt:
        return
    finally:
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGTERM)
            server.wait()
    raise Failure(f"the MLflow server stopped with code {code}; its messages above say why")


def command(root: Path, port: int) -> list[str]:
    """The MLflow server of the embedded store; SLIM has to be in its environment."""
    options = {
        "--backend-store-uri": store.tracking_uri(root),
        "--host": "127.0.0.1",
        "--port": str(port),
        "--default-artifact-root": (store.folder(root) / "artifacts").as_uri(),
        "--workers": "1",
        "--uvicorn-opts": "--log-level warning",
    }
    return [sys.executable, "-m", "mlflow", "server", *(part for option in options.items() for part in option)]
