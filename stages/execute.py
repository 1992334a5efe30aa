"""Run one stage: hand it the params it declares, record the run, write its small result."""

import csv
import fcntl
import importlib
import os
import resource
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from pipeline import ranks, tracking
from pipeline.config import Params, dump, flat
from pipeline.data.corpora import exists, source
from pipeline.data.tasks import task_source
from pipeline.errors import Failure
from pipeline.files import digest, read_json, write_json
from pipeline.training.machine import at_work, together
from stages.orphan import stop_with_dvc
from stages.paths import GRID_STAGES, SECTIONS, TRAINING, UPSTREAM, Cell, Paths, cells, of_images, read_result
from stages.resume import resumable, states_of

# Files of outputs/data each stage reads for its own purpose, and what for: recorded as the run's datasets.
DATASETS = {
    "pretrain": [("train", "training"), ("test", "test")],
    "warmup": [("tasks", "training")],
    "finetune": [("tasks", "training")],
    "robustness": [("test", "test"), ("tasks", "test")],
    "compute": [("train", "training")],
    "report": [],
}
LOCK_SECONDS = 5.0


def execute(stage: str, params: Params, paths: Paths, cell: Cell | None = None) -> dict[str, Any]:
    """Run `stage` (of one cell of the grid, where it has cells) and return what its result file holds.

    In a process that only shares another's training steps nothing is recorded, and nothing returned.
    """
    chosen = params.select(SECTIONS[stage], cell.method if cell else None)
    stop_with_dvc()
    if ranks.rank():
        if stage in TRAINING:
            _share(stage, chosen, params, paths, cell)
        return {}
    inputs = sources(params.data, paths.root) if stage == "prepare" else paths.inputs(stage, cell)
    for path in inputs:
        if not path.exists():
            raise Failure(f"{path}: not found; run the stage that makes it first (`dvc repro`, or `vqmoe train` for all stages)")
    place = {key: value for key, value in (cell._asdict() if cell else {}).items() if value is not None}
    shown = flat({"data": params.data}) | flat(chosen) | place
    name = cell.name if cell else stage
    started = time.monotonic()
    with (
        resumable(stage, chosen, params.resume, paths, cell, inputs) as states,
        tracking.start(
            paths.root,
            key=states.folder.name,
            resumed=states.begun,
            experiment=params.tracking.experiment,
            stage=stage,
            name=name,
            params=shown,
            inputs=inputs,
        ) as run,
    ):
        run.upstream(_upstream_runs(stage, params, paths, cell))
        run.text(dump(params), "params.yaml")
        if (lock := paths.root / "dvc.lock").exists():
            run.text(_whole(lock), lock.name)
        if stage != "prepare":
            profile = _manifest(params.data, paths, inputs)
            for file, context in DATASETS[stage]:
                if file != "tasks":
                    run.dataset(params.data.corpus, _split(params.data, paths, file), context, profile)
                for task in (cell.task,) if cell.task else params.data.tasks if file == "tasks" else ():
                    run.dataset(params.data.tasks[task], paths.task(task), context, profile)
        body = importlib.import_module(f"stages.{stage}").run
        given = (run.log, states) if stage in TRAINING else (run.log,)
        with (
            _enough_memory(stage, name),
            at_work(chosen.machine) if hasattr(chosen, "machine") else nullcontext(),
            together(chosen.machine) if stage in TRAINING else nullcontext(),
        ):
            metrics = body(chosen, paths, cell, *given) if cell else body(chosen, paths)
        numbers, step = _numbers(metrics), metrics.get("best_step", 0)
        valid = {key: value for key, value in numbers.items() if key.startswith("valid/")}
        # Points of a curve, which has them already; at step 0 they would be one more.
        run.log(valid, step)
        run.log({key: value for key, value in numbers.items() if key not in valid} | _cost(started))
        if stage == "robustness":
            for severity, values in _curves(paths.output(stage, cell) / "scores.csv"):
                run.log(values, severity)
        result = place | {"run_id": run.id, "metrics": metrics}
        if stage == "report":
            run.artifact(paths.report)
        else:
            write_json(paths.result(stage, cell), result)
        run.outputs(paths.outputs(stage, cell))
        for table in sorted(paths.output(stage, cell).glob("*.csv")) if cell else ():
            run.artifact(table)
        if cell and (paths.output(stage, cell) / "model.safetensors").exists():
            run.model(paths.output(stage, cell), f"{stage}-{name}", numbers, step)
    return result


def _share(stage: str, chosen: Any, params: Params, paths: Paths, cell: Cell | None) -> None:
    """Take part in the training steps of a stage that the first rank records. Before that one begins, inputs may be missing."""
    with (
        open(os.devnull, "w") as nowhere,
        redirect_stdout(nowhere),
        redirect_stderr(nowhere),
        at_work(chosen.machine),
        together(chosen.machine),
    ):
        states = states_of(stage, chosen, params.resume, paths, cell, paths.inputs(stage, cell))
        importlib.import_module(f"stages.{stage}").run(chosen, paths, cell, lambda values, step: None, states)


def _whole(lock: Path) -> str:
    """What dvc.lock holds. Dvc writes it in place, and one beside the dvc that runs this stage may be at it, if not for long."""
    guard, until = lock.parent / ".dvc/tmp/lock", time.monotonic() + LOCK_SECONDS
    with guard.open() if guard.exists() else nullcontext() as held:
        while held and time.monotonic() < until:
            try:
                fcntl.flock(held, fcntl.LOCK_SH | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.05)
        return lock.read_text(encoding="utf-8")


@contextmanager
def _enough_memory(stage: str, name: str) -> Iterator[None]:
    """Memory that a machine lacks is no fault of the code."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        said = str(error)
        if isinstance(error, MemoryError) or "out of memory" in said or "can't allocate memory" in said:
            wanted = next((line for line in said.splitlines() if "allocate" in line), "no memory is left").strip()
            raise Failure(f"{stage} {name}: out of memory ({wanted}); lower a batch, model.width or model.experts") from None
        raise


def _cost(started: float) -> dict[str, float]:
    """Time of the stage and the largest memory this process has had so far."""
    peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"cost/seconds": time.monotonic() - started, "cost/peak_memory_mib": peak_kib / 1024}


def sources(data: Any, root: Path) -> list[Path]:
    """Files or folders that the corpora and tasks of a section `data` come from, as far as they exist."""
    if of_images(data.view):
        from pipeline.data.image_sets import image_source

        named = [
            image_source(name, root)
            for name in (data.corpus, *data.tasks.values(), *data.shifts.values(), *data.outside.values())
        ]
    else:
        named = [source(corpus, root) for corpus in (data.corpus, *data.shifts.values())]
        named += [task_source(task, root) for task in data.tasks.values()]
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


def _manifest(data: Any, paths: Paths, inputs: Iterable[Path]) -> dict[str, Any]:
    """What `prepare` wrote about its data, which has to be the data that params ask for, its inputs as they were written."""
    path, remedy = paths.data / "manifest.json", "run `vqmoe prepare` again"
    manifest = read_json(path, remedy)
    if not isinstance(manifest, dict):
        raise Failure(f"{path}: holds {type(manifest).__name__}, expected the description of the data; {remedy}")
    there = flat(manifest)
    for key, wanted in flat(data).items():
        if there.get(key) != wanted:
            raise Failure(f"{path}: {key} is {there.get(key)!r} there and {wanted!r} in params; {remedy}")
    for place in (_split(data, paths, "train"), _split(data, paths, "test"), *map(paths.task, data.tasks)):
        if not place.exists():
            raise Failure(f"{place}: not found; {remedy}")
    if not isinstance(digests := manifest.get("sha256"), dict):
        raise Failure(f"{path}: has no sha256 of what it describes; {remedy}")
    for name, sha256 in digests.items():
        place = paths.data / name
        if any(place.is_relative_to(given) for given in inputs) and not (place.exists() and digest(place) == sha256):
            raise Failure(f"{place}: not as `vqmoe prepare` left it; {remedy}")
    return {key: manifest.get(key) for key in ("corpus", "view", "tasks", "tokens", "examples") if key in manifest}


def _curves(scores: Path) -> Iterator[tuple[int, dict[str, float]]]:
    """Each measure against severity in thousandths: mean over the kinds of noise or attack, in the mode of inference.

    Methods differ in what their mode is called: a chart that has all of them needs one name.
    """
    from pipeline.evaluation.records import MEASURES

    with open(scores, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    inference = {row["model"]: row["mode"] for row in rows}
    points: dict[int, dict[str, list[float]]] = {}
    for row in rows:
        family = "noise" if row["family"] == "clean" else row["family"]
        if family in ("noise", "attack") and row["mode"] == inference[row["model"]]:
            point = points.setdefault(round(1000 * float(row["rate"])), {})
            for name in MEASURES:
                if row[name]:
                    point.setdefault(f"curve/{row['model']}/{family}/{name}", []).append(float(row[name]))
    for severity, point in points.items():
        yield severity, {key: sum(values) / len(values) for key, values in point.items()}


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
