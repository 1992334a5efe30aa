"""The MLflow pages, served from this machine to this machine."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import webbrowser
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import Failure, UsageError
from pipeline.tracking import store
from pipeline.tracking.run import terminable

if TYPE_CHECKING:
    from mlflow import MlflowClient

# One worker and no job runner: starts in seconds and takes a sixth of the memory of the default server.
SLIM = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "PYTHONWARNINGS": "ignore"}

# A saved view of the runs page is a tag of its experiment, and the page opens with it if its address says so.
VIEW = "by-method"
_TAG = f"mlflow.sharedViewState.{VIEW}"
_COLUMNS = (
    "attributes.`Dataset`",
    "attributes.`Models`",
    "params.`seed`",
    *(f"metrics.`test/{name}`" for name in ("bpc", "perplexity", "accuracy", "macro_f1")),
)
_STATE = {
    "groupBy": {"aggregateFunction": "average", "groupByKeys": [{"mode": "tag", "groupByData": "method"}]},
    "selectedColumns": _COLUMNS,
}
_SAVED = json.dumps({"name": "by method", "createdAt": 0, "state": json.dumps(_STATE)})


def serve(root: Path, port: int, experiment: str, in_browser: bool = False) -> None:
    """Run the server on 127.0.0.1 until interrupted, and say where its pages are: those of the runs of `experiment`.

    A server named by MLFLOW_TRACKING_URI is pointed to instead. `in_browser` opens the pages.
    """
    uri = store.tracking_uri(root)
    shown = store.without_credentials(uri)
    if uri.startswith("http"):
        try:
            page = _runs(store.connect(root), experiment)
        except Failure as error:
            raise Failure(f"{shown}: {error}; check MLFLOW_TRACKING_URI") from None
        except Exception:  # one that is out of reach has an address all the same
            page = ""
        address = f"{shown.rstrip('/')}/{page}"
        print(f"Runs are recorded by a server of their own; open {address}")
        if in_browser:
            webbrowser.open(address)
        return
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            raise UsageError(f"port {port} is taken; name another with --port") from None
    try:
        client = store.connect(root)
        _save_view(client, experiment)
        page = _runs(client, experiment)
    except OSError as error:
        raise Failure(f"{store.folder(root)}: cannot be used ({error.strerror}); it has to be a writable folder") from None
    except Exception as error:  # whatever a store raises
        raise Failure(f"{shown}: runs cannot be read there ({store.reason(error)}); check MLFLOW_TRACKING_URI") from None
    # A session of its own, so that all of its processes can be stopped together.
    server = subprocess.Popen(command(root, port), env=os.environ | SLIM, start_new_session=True)
    try:
        with terminable():
            while server.poll() is None and not _answers(port):
                time.sleep(0.1)
            if server.poll() is None:
                address = f"http://127.0.0.1:{port}/{page and f'{page}&viewStateShareKey={VIEW}'}"
                if not page:
                    print(f"There are no runs of {experiment} yet: run `dvc repro` first")
                print(f"MLflow: {address} (Ctrl-C stops it)", flush=True)
                if in_browser:
                    webbrowser.open(address)
            code = server.wait()
    except KeyboardInterrupt:
        return
    finally:
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGTERM)
            server.wait()
    raise Failure(f"the MLflow server stopped with code {code}; its messages above say why")


def _save_view(client: "MlflowClient", experiment: str) -> None:
    """Let the pages of all stages have the view. A server of another version need not know it, and is spared."""
    for stage in client.search_experiments():
        if stage.name.startswith(f"{experiment}/") and stage.tags.get(_TAG) != _SAVED:
            client.set_experiment_tag(stage.experiment_id, _TAG, _SAVED)


def _runs(client: "MlflowClient", experiment: str) -> str:
    """Where in the pages the runs of pre-training are, or "" if there are none."""
    first = client.get_experiment_by_name(f"{experiment}/pretrain")
    if first is None or not client.search_runs([first.experiment_id], max_results=1):
        return ""
    return f"#/experiments/{first.experiment_id}/runs?workflowType=machine_learning"


def _answers(port: int) -> bool:
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


def command(root: Path, port: int) -> list[str]:
    """The MLflow server of the embedded store; SLIM has to be in its environment."""
    options = {
        "--backend-store-uri": store.tracking_uri(root),
        "--registry-store-uri": store.tracking_uri(root),
        "--host": "127.0.0.1",
        "--port": str(port),
        "--default-artifact-root": (store.folder(root) / "artifacts").as_uri(),
        "--workers": "1",
        "--uvicorn-opts": "--log-level warning",
    }
    return [sys.executable, "-m", "mlflow", "server", *(part for option in options.items() for part in option)]
