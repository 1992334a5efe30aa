"""Run one stage: hand it the params it declares, record the run, write its small result."""

import importlib
import resource
import time
from pathlib import Path
from typing import Any

from pipeline import tracking
from pipeline.config import Params, flat
from pipeline.data.corpora import exists, source
from pipeline.data.tasks import task_source
from pipeline.errors import Failure
from pipeline.files import read_json, write_json
from stages.paths import GRID_STAGES, SECTIONS, UPSTREAM, Cell, Paths, cells, of_images, read_result

# Files of outputs/data each stage reads for its own purpose, and what for: recorded as the run's datasets.
DATASETS = {
    "pretrain": [("train", "training"), ("test", "test")],
    "warmup": [("tasks", "training")],
    "finetune": [("tasks", "training")],
    "robustness": [("test", "test"), ("tasks", "test")],
    "compute": [("train", "training")],
    "report": [],
}


def execute(stage: str, params: Params, paths: Paths, cell: Cell | None = None) -> dict[str, Any]:
    """Run `stage` (of one cell of the grid, where it has cells) and return what its result file holds."""
    chosen = params.select(SECTIONS[stage], cell.method if cell else None)
    inputs = _sources(params.data, paths) if stage == "prepare" else paths.inputs(stage, cell)
    for path in inputs:
        if not path.exists():
            raise Failure(f"{path}: not found; run the stage that makes it first (`dvc repro`, or `vqmoe train` for all stages)")
    place = {key: value for key, value in (cell._asdict() if cell else {}).items() if value is not None}
    shown = flat({"data": params.data}) | flat(chosen) | place
    name = cell.name if cell else stage
    started = time.monotonic()
    with tracking.start(
        paths.root, experiment=params.tracking.experiment, stage=stage, name=name, params=shown, inputs=inputs
    ) as run:
        run.upstream(_upstream_runs(stage, params, paths, cell))
        if stage != "prepare":
            profile = _manifest(params.data, paths)
            for file, context in DATASETS[stage]:
                if file != "tasks":
                    run.dataset(params.data.corpus, _split(params.data, paths, file), context, profile)
                for task in (cell.task,) if cell.task else params.data.tasks if file == "tasks" else ():
                    run.dataset(params.data.tasks[task], paths.task(task), context, profile)
        body = importlib.import_module(f"stages.{stage}").run
        metrics = body(chosen, paths, cell, run.log) if cell else body(chosen, paths)
        run.log(_numbers(metrics) | _cost(started))
        result = place | {"run_id": run.id, "metrics": metrics}
        if stage == "report":
            run.artifact(paths.report)
        else:
            write_json(paths.result(stage, cell), result)
        run.outputs(paths.outputs(stage, cell))
        for table in sorted(paths.output(stage, cell).glob("*.csv")) if cell else ():
            run.artifact(table)
        if cell and (paths.output(stage, cell) / "model.safetensors").exists():
            run.model(paths.output(stage, cell), name=f"{stage}-{name}", metrics=_numbers(metrics))
    return result


def _cost(started: float) -> dict[str, float]:
    """Time of the stage and the largest memory this process has had so far."""
    peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"cost/seconds": time.monotonic() - started, "cost/peak_memory_mib": peak_kib / 1024}


def _sources(data: Any, paths: Paths) -> list[Path]:
    """Files or folders that corpus and task come from."""
    if of_images(data.view):
        from pipeline.data.image_sets import image_source

        named = [
            image_source(name, paths.root)
            for name in (data.corpus, *data.tasks.values(), *data.shifts.values(), *data.outside.values())
        ]
    else:
        named = [source(corpus, paths.root) for corpus in (data.corpus, *data.shifts.values())]
        named += [task_source(task, paths.root) for task in data.tasks.values()]
    return [path for path in named if exists(path)]


def _split(data: Any, paths: Paths, split: str) -> Path:
    """A split of what is pre-trained on: a file of tokens, a folder of images."""
    return paths.source / (split if of_images(data.view) else f"{split}.npy")


def _upstream_runs(stage: str, params: Params, paths: Paths, cell: Cell | None) -> dict[str, str]:
    """Run ids of the stages whose outputs this one reads, as their result files hold them."""
    if stage == "prepare":
        return {}
    results = {"prepare": paths.result("prepare")}
    methods, seeds = ((cell.method,), (cell.seed,)) if cell else (params.grid.methods, params.grid.seeds)
    tasks = (cell.task,) if cell and cell.task else tuple(params.data.tasks)
    for upstream in UPSTREAM[stage]:
        for one in cells(upstream, methods, seeds, tasks):
            results[upstream if cell and cell.task else f"{upstream}.{one.name}"] = paths.result(upstream, one)
    # A result file that is not there costs the tag, not the run: models may have come without it.
    return {name: read_result(path)["run_id"] for name, path in results.items() if path.exists()}


def _manifest(data: Any, paths: Paths) -> dict[str, Any]:
    """What `prepare` wrote about its data, which has to be the data that params ask for."""
    path, remedy = paths.data / "manifest.json", "run `vqmoe prepare` again"
    manifest = read_json(path, remedy)
    if not isinstance(manifest, dict):
        raise Failure(f"{path}: holds {type(manifest).__name__}, expected the description of the data; {remedy}")
    there = flat(manifest)
    for key, wanted in flat(data).items():
        if there.get(key) != wanted:
            raise Failure(f"{path}: {key} is {there.get(key)!r} there and {wanted!r} in params; {remedy}")
    for path in (_split(data, paths, "train"), _split(data, paths, "test"), *map(paths.task, data.tasks)):
        if not path.exists():
            raise Failure(f"{path}: not found; {remedy}")
    return {key: manifest.get(key) for key in ("corpus", "view", "tasks", "tokens", "examples") if key in manifest}


def _numbers(metrics: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """Nested metrics as MLflow keys: {"test": {"bpc": 1.7}} is test/bpc."""
    result: dict[str, float] = {}
    for key, value in metrics.items():
        if isinstance(value, dict):
            result |= _numbers(value, f"{prefix}{key}/")
        elif isinstance(value, int | float):
            result[f"{prefix}{key}"] = float(value)
    return result


def train(params: Params, paths: Paths, cell: Cell) -> None:
    """All stages of a method and seed, for all tasks, in this process."""
    params = params.model_copy(update={"grid": type(params.grid)(methods=(cell.method,), seeds=(cell.seed,))})
    execute("prepare", params, paths)
    for stage in (*GRID_STAGES, "compute"):
        for one in cells(stage, params.grid.methods, params.grid.seeds, params.data.tasks):
            execute(stage, params, paths, one)
    execute("report", params, paths)
