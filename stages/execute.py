"""Run one stage: hand it the params it declares, record the run, write its small result."""

import importlib
import resource
import time
from typing import Any

from pipeline import tracking
from pipeline.config import Params, flat
from pipeline.errors import Failure
from pipeline.files import read_json, write_json
from stages.paths import GRID_STAGES, SECTIONS, UPSTREAM, Cell, Paths


def execute(stage: str, params: Params, paths: Paths, cell: Cell | None = None) -> dict[str, Any]:
    """Run `stage` (of one cell of the grid, where it has cells) and return what its result file holds."""
    chosen = params.select(SECTIONS[stage], cell.method if cell else None)
    for path in paths.inputs(stage, cell):
        if not path.exists():
            raise Failure(f"{path}: not found; run the stage that makes it first (`dvc repro`, or `vqmoe train` for all stages)")
    shown = flat(chosen) | ({"method": cell.method, "seed": cell.seed} if cell else {})
    name = cell.name if cell else stage
    started = time.monotonic()
    with tracking.start(
        paths.root, experiment=params.tracking.experiment, stage=stage, name=name, params=shown, inputs=paths.inputs(stage, cell)
    ) as run:
        run.upstream(_upstream_runs(stage, paths, cell))
        if stage != "prepare":
            manifest = _manifest(chosen.data, paths)
            profile = {"tokens": manifest["tokens"], "view": manifest["view"]}
            run.dataset(manifest["corpus"], paths.data / "train.npy", "training", profile)
        body = importlib.import_module(f"stages.{stage}").run
        metrics = body(chosen, paths, cell, run.log) if cell else body(chosen, paths)
        run.log(_numbers(metrics) | _cost(started))
        result = ({"method": cell.method, "seed": cell.seed} if cell else {}) | {"run_id": run.id, "metrics": metrics}
        if stage == "report":
            run.artifact(paths.report)
        else:
            write_json(paths.result(stage, cell), result)
        run.outputs(paths.outputs(stage, cell))
        if cell and (paths.output(stage, cell) / "model.safetensors").exists():
            run.model(paths.output(stage, cell), name=f"{stage}-{name}", metrics=_numbers(metrics))
    return result


def _cost(started: float) -> dict[str, float]:
    """Time of the stage and the largest memory this process has had so far."""
    peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"cost/seconds": time.monotonic() - started, "cost/peak_memory_mib": peak_kib / 1024}


def _upstream_runs(stage: str, paths: Paths, cell: Cell | None) -> dict[str, str]:
    """Run ids of the stages whose outputs this one reads, as their result files hold them."""
    if stage == "prepare":
        return {}
    results = {"prepare": paths.result("prepare")}
    if cell:
        results |= {upstream: paths.result(upstream, cell) for upstream in UPSTREAM[stage]}
    return {name: read_json(path, "run that stage again")["run_id"] for name, path in results.items() if path.exists()}


def _manifest(data: Any, paths: Paths) -> dict[str, Any]:
    """What `prepare` wrote about its data, which has to be the data that params ask for."""
    path = paths.data / "manifest.json"
    manifest = read_json(path, "run `vqmoe prepare` again")
    for key, wanted in flat(data).items():
        if manifest.get(key) != wanted:
            raise Failure(f"{path}: {key} is {manifest.get(key)!r} there and {wanted!r} in params; run `vqmoe prepare` again")
    return manifest


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
