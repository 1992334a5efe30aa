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
from stages.paths import GRID_STAGES, SECTIONS, UPSTREAM, Cell, Paths, read_result

# Files of outputs/data each stage reads for its own purpose, and what for: recorded as the run's datasets.
DATASETS = {
    "pretrain": [("train.npy", "training"), ("test.npy", "test")],
    "warmup": [("task.jsonl", "training")],
    "finetune": [("task.jsonl", "training")],
    "robustness": [("test.npy", "test"), ("task.jsonl", "test")],
    "report": [],
}


def execute(stage: str, params: Params, paths: Paths, cell: Cell | None = None) -> dict[str, Any]:
    """Run `stage` (of one cell of the grid, where it has cells) and return what its result file holds."""
    chosen = params.select(SECTIONS[stage], cell.method if cell else None)
    inputs = _sources(params.data, paths) if stage == "prepare" else paths.inputs(stage, cell)
    for path in inputs:
        if not path.exists():
            raise Failure(f"{path}: not found; run the stage that makes it first (`dvc repro`, or `vqmoe train` for all stages)")
    shown = flat({"data": params.data}) | flat(chosen) | ({"method": cell.method, "seed": cell.seed} if cell else {})
    name = cell.name if cell else stage
    started = time.monotonic()
    with tracking.start(
        paths.root, experiment=params.tracking.experiment, stage=stage, name=name, params=shown, inputs=inputs
    ) as run:
        run.upstream(_upstream_runs(stage, params, paths, cell))
        if stage != "prepare":
            profile = _manifest(params.data, paths)
            for file, context in DATASETS[stage]:
                run.dataset(profile["task" if file == "task.jsonl" else "corpus"], paths.data / file, context, profile)
        body = importlib.import_module(f"stages.{stage}").run
        metrics = body(chosen, paths, cell, run.log) if cell else body(chosen, paths)
        run.log(_numbers(metrics) | _cost(started))
        result = ({"method": cell.method, "seed": cell.seed} if cell else {}) | {"run_id": run.id, "metrics": metrics}
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
    return [path for path in (source(data.corpus, paths.root), task_source(data.task, paths.root)) if exists(path)]


def _upstream_runs(stage: str, params: Params, paths: Paths, cell: Cell | None) -> dict[str, str]:
    """Run ids of the stages whose outputs this one reads, as their result files hold them."""
    if stage == "prepare":
        return {}
    results = {"prepare": paths.result("prepare")}
    if cell:
        results |= {upstream: paths.result(upstream, cell) for upstream in UPSTREAM[stage]}
    else:
        cells = [Cell(method, seed) for method in params.grid.methods for seed in params.grid.seeds]
        results |= {f"{upstream}.{one.name}": paths.result(upstream, one) for upstream in GRID_STAGES for one in cells}
    # A result file that is not there costs the tag, not the run: models may have come without it.
    return {name: read_result(path)["run_id"] for name, path in results.items() if path.exists()}


def _manifest(data: Any, paths: Paths) -> dict[str, Any]:
    """What `prepare` wrote about its data, which has to be the data that params ask for."""
    path, remedy = paths.data / "manifest.json", "run `vqmoe prepare` again"
    manifest = read_json(path, remedy)
    if not isinstance(manifest, dict):
        raise Failure(f"{path}: holds {type(manifest).__name__}, expected the description of the data; {remedy}")
    for key, wanted in flat(data).items():
        if manifest.get(key) != wanted:
            raise Failure(f"{path}: {key} is {manifest.get(key)!r} there and {wanted!r} in params; {remedy}")
    missing = [name for names in DATASETS.values() for name, _ in names if not (paths.data / name).exists()]
    if missing:
        raise Failure(f"{paths.data / missing[0]}: not found; {remedy}")
    return {key: manifest.get(key) for key in ("corpus", "view", "task", "tokens", "examples")}


def _numbers(metrics: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """Nested metrics as MLflow keys: {"test": {"bpc": 1.7}} is test/bpc."""
    result: dict[str, float] = {}
    for key, value in metrics.items():
        if isinstance(value, dict):
            result |= _numbers(value, f"{prefix}{key}/")
        elif isinstance(value, int | float):
            result[f"{prefix}{key}"] = float(value)
    return result


def train(params: Params, paths: Paths, cell: Cell) -> dict[str, dict[str, Any]]:
    """All stages of one cell in this process, from the data on. Results by stage."""
    results = {"prepare": execute("prepare", params, paths)}
    for stage in GRID_STAGES:
        results[stage] = execute(stage, params, paths, cell)
    return results
