"""Runs as the store has them."""

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import Failure
from pipeline.tracking import store

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run


class Recorded:
    """A run that ended or still runs: `status`, `params` and `tags` as text, `metrics` with the last value of each."""

    def __init__(self, client: "MlflowClient", run: "Run") -> None:
        self._client, self._place = client, run.info.artifact_uri
        self.id, self.status = run.info.run_id, run.info.status
        self.params, self.tags, self.metrics = run.data.params, run.data.tags, run.data.metrics

    def text(self, name: str) -> str:
        """The file `name` that is stored with the run. Raises Failure if it cannot be had."""
        with tempfile.TemporaryDirectory() as folder:
            try:
                return Path(self._client.download_artifacts(self.id, name, folder)).read_bytes().decode()
            except Exception as error:  # whatever a store or a network raises
                raise Failure(
                    f"run {self.id}: its artifact {name} is lost ({type(error).__name__}); it has to lie under "
                    f"{store.without_credentials(self._place)}, where runs of older versions have none"
                ) from None

    def has(self, name: str) -> bool:
        """Whether a file `name` is stored with the run."""
        try:
            return any(file.path == name for file in self._client.list_artifacts(self.id))
        except Exception as error:
            raise _unreadable(self._place, error) from None


def find(root: Path, prefix: str) -> list[Recorded]:
    """Runs whose ids begin with `prefix`, two at most. Raises Failure if the store cannot be read."""
    try:
        return _search(store.connect(root), prefix)
    except Exception as error:
        raise _unreadable(store.tracking_uri(root), error) from None


def embedded(root: Path, run_id: str) -> Recorded:
    """A run in the embedded store of `root`, whatever MLFLOW_TRACKING_URI says. Raises Failure if it is not there."""
    store.prepare_environment()
    from mlflow import MlflowClient

    uri = store.embedded_uri(root)
    try:
        client = MlflowClient(tracking_uri=uri)
        return Recorded(client, client.get_run(run_id))
    except Exception as error:
        raise _unreadable(uri, error) from None


def _search(client: "MlflowClient", prefix: str) -> list[Recorded]:
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    if not experiments:
        return []
    runs = client.search_runs(experiments, f"attributes.run_id LIKE '{prefix}%'", max_results=2)
    return [Recorded(client, run) for run in runs]


def _unreadable(uri: str, error: Exception) -> Failure:
    line = store.without_credentials(str(error).strip() or type(error).__name__).splitlines()[0]
    return Failure(f"{store.without_credentials(uri)}: runs cannot be read there ({line}); check MLFLOW_TRACKING_URI")
