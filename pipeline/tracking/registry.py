"""MLflow's registry: models put into it, and got out of it or out of a run."""

import difflib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from pipeline.errors import Failure, UsageError
from pipeline.tracking import store
from pipeline.tracking.recorded import RUN, Logged, Recorded, named, reader, unreadable, whole

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

REGISTERED = re.compile(r"models:/([^/@:]+)(?:/(\d+)|@([^/@:]+))")
CHAMPION = "champion"
# Tag of a version with its score on validation, the lowest best, and of a registered model with what that is measured on.
SCORE, MEASURED_ON = "validation", "vqmoe.measured_on"
SHOWN = 5
# Of a version: what a store can hold.
DIGITS = 9


class Candidate(NamedTuple):
    """A run's model on its way into the registry: its score on validation, what that was measured on, tags with its method."""

    run: Recorded
    model: Logged
    measured_on: str
    score: float
    tags: Mapping[str, str]


class Version(NamedTuple):
    """A version of a registered model."""

    name: str
    version: int
    run_id: str
    score: float
    tags: Mapping[str, str]
    aliases: Sequence[str]


def names_model(source: str) -> bool:
    """Whether `source` reads as a run's id or a registered model, and not as a path."""
    return source.startswith("models:") or RUN.fullmatch(source) is not None


def fetch(root: Path, source: str, folder: Path) -> tuple[Path, Recorded | None]:
    """Put the files of a model into a folder below `folder`; that folder, and the run that made them if it is there.

    `source` is the first characters of a run's id, `models:/name/version` or `models:/name@alias`. Raises UsageError for one
    that there is not, Failure if the store or the files cannot be read.
    """
    uri = store.tracking_uri(root)
    if source.startswith("models:"):
        with _readable(uri, "models"):
            form, client = _form(source), reader(root)
            if client is None:
                raise UsageError(f"{source}: no model is registered here; `vqmoe register` makes them")
            version = _version(client, *form)
            place = client.get_model_version_download_uri(version.name, version.version)
        run = whole(root, version.run_id or "")
    else:
        run = named(root, source)
        place = run.model().place
    with _readable(place, f"the files of {source}"):
        import mlflow.artifacts

        return Path(mlflow.artifacts.download_artifacts(place, dst_path=str(folder), tracking_uri=uri)), run


def register(root: Path, name: str, description: str, candidates: Sequence[Candidate]) -> list[Version]:
    """Give `name` a version for each run that has none, and aliases: `champion` the best, a method's the best of its own.

    Returns all of its versions, the first one first; those that somebody else made, without a score, are left out and alone.
    Raises UsageError where the scores of its versions were measured on something else, Failure if the store cannot be reached.
    """
    with _readable(store.tracking_uri(root), "registered models"):
        client = store.connect(root)
        registered = next(iter(client.search_registered_models(f"name = '{name}'")), None)
        if registered is None:
            registered = client.create_registered_model(name, {MEASURED_ON: candidates[0].measured_on}, description)
        for one in candidates:
            if registered.tags.get(MEASURED_ON) != one.measured_on:
                raise UsageError(
                    f"run {one.run.id}: validated on other data than the versions of {name}, so that scores do not compare; name "
                    "this experiment, such as by -S tracking.experiment=mine"
                )
        known = {version.run_id for version in _versions(client, name)}
        for one in candidates:
            if one.run.id not in known:
                said = f"{one.run.name}: {one.tags['unit']} {one.score:.4f} on validation"
                tags = {**one.tags, SCORE: repr(one.score)}
                made = client.create_model_version(
                    name, one.model.place, one.run.id, tags=tags, description=said, model_id=one.model.id
                )
                _link(client, one.model.id, made)
        versions = [version for version in _versions(client, name) if {SCORE, "method"} <= version.tags.keys()]
        best: dict[str, ModelVersion] = {}
        for version in sorted(versions, key=lambda version: float(version.tags[SCORE])):
            for alias in (CHAMPION, version.tags["method"]):
                best.setdefault(alias, version)
        for alias, version in best.items():
            if str(registered.aliases.get(alias)) != str(version.version):
                client.set_registered_model_alias(name, alias, version.version)
    return [
        Version(name, int(one.version), one.run_id, float(one.tags[SCORE]), one.tags, [key for key in best if best[key] is one])
        for one in versions
    ]


@contextmanager
def _readable(uri: str, what: str) -> Iterator[None]:
    """Whatever a store, a driver or a network raises becomes a Failure."""
    try:
        yield
    except (UsageError, Failure):
        raise
    except Exception as error:
        raise unreadable(uri, error, what) from None


def _link(client: "MlflowClient", model_id: str, made: "ModelVersion") -> None:
    """Let the pages of a logged model name a version that was made of it."""
    from mlflow.utils.mlflow_tags import MLFLOW_MODEL_VERSIONS

    known = json.loads(client.get_logged_model(model_id).tags.get(MLFLOW_MODEL_VERSIONS, "[]"))
    links = [*known, {"name": made.name, "version": made.version}]
    client.set_logged_model_tags(model_id, {MLFLOW_MODEL_VERSIONS: json.dumps(links)})


def _versions(client: "MlflowClient", name: str) -> "list[ModelVersion]":
    """All versions of a registered model, the first one first."""
    found, token = [], None
    while True:
        page = client.search_model_versions(f"name = '{name}'", page_token=token)
        found += page
        token = page.token
        if not token:
            return sorted(found, key=lambda one: int(one.version))


def _form(source: str) -> tuple[str, str | None, str | None]:
    """Name, version and alias; one of the last two."""
    form = REGISTERED.fullmatch(source)
    if not form:
        raise UsageError(f"'{source}' names no registered model: write models:/name@alias or models:/name/version")
    name, version, alias = form.groups()
    if version and len(version) > DIGITS:
        raise UsageError(f"'{source}': a version has at most {DIGITS} digits; write models:/name@alias or models:/name/version")
    return name, version, alias


def _version(client: "MlflowClient", name: str, version: str | None, alias: str | None) -> "ModelVersion":
    from mlflow.exceptions import MlflowException

    try:
        return client.get_model_version(name, version) if version else client.get_model_version_by_alias(name, alias)
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        names = [one.name for one in client.search_registered_models()]
        if name not in names:
            raise UsageError(f"there is no registered model '{name}'; {_there_are(name, names)}") from None
        aliases = client.get_registered_model(name).aliases
        if alias and alias not in aliases:
            raise UsageError(f"{name} has no alias '{alias}'; {_there_are(alias, aliases)}") from None
        versions = [one.version for one in _versions(client, name)]
        if version and version not in map(str, versions):
            raise UsageError(f"{name} has no version {version}; {_there_are(version, map(str, versions))}") from None
        raise


def _there_are(wanted: str, known: Iterable[str]) -> str:
    """Names that exist, the nearest first."""
    near = difflib.get_close_matches(wanted, [*known], SHOWN, cutoff=0)
    return f"there are: {', '.join(near)}" if near else "there are none: `vqmoe register` makes them"
