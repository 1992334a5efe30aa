"""Runs as the store has them."""

import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from pipeline.errors import Failure, UsageError
from pipeline.tracking import store

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

# The first digits of an id, or what a run is called that could not be recorded at once.
RUN = re.compile("[0-9a-f]{4,32}|offline-[0-9a-f]{8}")
WHOLE = re.compile("[0-9a-f]{32}|offline-[0-9a-f]{8}")


class Logged(NamedTuple):
    """A model that a run logged: its id, where its files lie, and its scores, which are those of the weights that were kept."""

    id: str
    place: str
    metrics: dict[str, float]


class Recorded:
    """A run that ended or still runs: `status`, `params` and `tags` as text, `metrics` with the last value of each."""

    def __init__(self, client: "MlflowClient", run: "Run") -> None:
        self._client, self._place, self._experiment = client, run.info.artifact_uri, run.info.experiment_id
        self.id, self.name, self.status = run.info.run_id, run.info.run_name, run.info.status
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
            raise unreadable(self._place, error) from None

    def model(self) -> Logged:
        """The model that the run logged. Raises UsageError if there is none, or not all of it."""
        try:
            found = self._client.search_logged_models([self._experiment], f"source_run_id = '{self.id}'")
        except Exception as error:
            raise unreadable(self._place, error) from None
        for model in found:
            if str(model.status) == "READY":
                return Logged(model.model_id, model.artifact_location, {one.key: one.value for one in model.metrics or ()})
        what = f"{self.tags.get('vqmoe.stage', 'no stage')} {self.name}, {self.status}"
        raise UsageError(f"run {self.id} ({what}) has no model; runs of pretrain, warmup and finetune have one in the end")


def named(root: Path, prefix: str) -> Recorded:
    """The one run whose id begins with `prefix`. Raises UsageError if there is none, Failure if the store cannot be read."""
    if not RUN.fullmatch(prefix):
        raise UsageError(f"'{prefix}' is no run id: give 4 to 32 of the digits 0-9 and a-f that it begins with, as in results/")
    found = find(root, prefix)
    if not found:
        raise UsageError(f"no run has an id that begins with {prefix}; `vqmoe ui` shows the runs that there are")
    if len(found) > 1:
        raise UsageError(f"{found[0].id} and {found[1].id} both begin with {prefix}; give more of the id")
    return found[0]


def find(root: Path, prefix: str) -> list[Recorded]:
    """Runs whose ids begin with `prefix`, or that were called so offline, two at most.

    Raises Failure if the store cannot be read.
    """
    try:
        client = reader(root)
        return _search(client, prefix) if client else []
    except Exception as error:
        raise unreadable(store.tracking_uri(root), error) from None


def whole(root: Path, run_id: str) -> Recorded | None:
    """The run of that id, and not of one that it begins; None if there is none. Raises Failure if the store cannot be read."""
    return next(iter(find(root, run_id)), None) if WHOLE.fullmatch(run_id) else None


def reader(root: Path) -> "MlflowClient | None":
    """A client of the store as it is; None for an embedded one that is not there, which reading does not make."""
    if store.tracking_uri(root) == store.embedded_uri(root) and store.database_file(root) is None:
        return None
    return store.connect(root)


def embedded(root: Path, run_id: str) -> Recorded:
    """A run in the embedded store of `root`, whatever MLFLOW_TRACKING_URI says. Raises Failure if it is not there."""
    store.prepare_environment()
    from mlflow import MlflowClient

    uri = store.embedded_uri(root)
    try:
        client = MlflowClient(tracking_uri=uri)
        return Recorded(client, client.get_run(run_id))
    except Exception as error:
        raise unreadable(uri, error) from None


def _search(client: "MlflowClient", prefix: str) -> list[Recorded]:
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    if not experiments:
        return []
    offline = f"tags.`vqmoe.offline_id` = '{prefix}'"
    wanted = offline if prefix.startswith("offline-") else f"attributes.run_id LIKE '{prefix}%'"
    runs = client.search_runs(experiments, wanted, max_results=2)
    return [Recorded(client, run) for run in runs]


def unreadable(uri: str, error: Exception, what: str = "runs") -> Failure:
    return Failure(
        f"{store.without_credentials(uri)}: {what} cannot be read there ({store.reason(error)}); check MLFLOW_TRACKING_URI"
    )
