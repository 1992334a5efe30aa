"""Put the models of a grid's runs into MLflow's registry."""

import json

from pipeline import tracking
from pipeline.config import Params, fingerprint
from pipeline.errors import Failure
from pipeline.evaluation.tables import Table
from stages.paths import Cell, Paths, cells, of_images, read_result

# What training keeps the lowest of, on validation.
UNITS = ("nats", "bpc", "perplexity")
# Params that say how much of the validation split is scored.
COUNTS = ("validate_tokens", "validate_passages", "validate_images")


def register(params: Params, paths: Paths, as_json: bool) -> None:
    """Register the pre-trained models by one name, the classifiers of each task by another, and print what is there then.

    Raises Failure for a run that is not in the store and a store out of reach, UsageError where a name has models that were
    validated on other data.
    """
    data, kind = params.data, "image-classifier" if of_images(params.data.view) else "language-model"
    about = {(kind, "pretrain", None): f"a model of {data.corpus}"}
    about |= {(task, "finetune", task): f"a classifier for {task} ({source})" for task, source in data.tasks.items()}
    # All that can be missing is looked for before anything is registered.
    found = {
        (name, text): [_candidate(stage, cell, paths) for cell in cells(stage, params.grid.methods, params.grid.seeds, [task])]
        for (name, stage, task), text in about.items()
    }
    versions: list[tracking.Version] = []
    for (name, text), candidates in found.items():
        description = (
            f"Each version is {text}, view {data.view}, trained by vqmoe. The alias {tracking.CHAMPION} is the best of all by "
            "validation, that of a method the best of its own. Scores of other names do not compare."
        )
        versions += tracking.register(paths.root, f"{params.tracking.experiment}-{name}", description, candidates)
    _show(versions, as_json)


def _candidate(stage: str, cell: Cell, paths: Paths) -> tracking.Candidate:
    path = paths.result(stage, cell)
    run_id = read_result(path)["run_id"]
    run = tracking.whole(paths.root, run_id)
    if run is None:
        raise Failure(
            f"{path}: its run {run_id} is not in this MLflow store; set MLFLOW_TRACKING_URI to the one that has it, send it "
            "(`vqmoe track sync`) or make it again (`dvc repro --force`)"
        )
    model = run.model()
    scores = {unit: model.metrics[f"valid/{unit}"] for unit in UNITS if f"valid/{unit}" in model.metrics}
    if not scores:
        raise Failure(f"run {run.id}: its model has no score on validation; `vqmoe track sync` sends what is left of a run")
    unit, score = next(iter(scores.items()))
    tags = {key: str(value) for key, value in cell._asdict().items() if value is not None} | {"unit": unit}
    return tracking.Candidate(run, model, _measured_on(stage, run), score, tags)


def _measured_on(stage: str, run: tracking.Recorded) -> str:
    """Digest of what a run's validation was about: its data as it was prepared, and how much of that is scored."""
    data = {name: md5 for name, md5 in run.tags.items() if name.startswith("md5.in.") and "outputs/data/" in name}
    return fingerprint(data | {key: run.params.get(f"{stage}.{key}") for key in COUNTS})


def _show(versions: list[tracking.Version], as_json: bool) -> None:
    if as_json:
        print(json.dumps([one._asdict() for one in versions], indent=2))
        return
    rows = [
        (f"models:/{one.name}/{one.version}", f"{one.score:.4f}", one.tags["unit"], ", ".join(one.aliases), one.run_id)
        for one in versions
    ]
    Table("Registered models", ("model", "validation", "unit", "aliases", "run"), rows).show()
