"""Where every stage reads and writes, and which params it may see; a test holds dvc.yaml to this."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.errors import Failure
from pipeline.files import read_json

GRID_STAGES = ("pretrain", "warmup", "finetune", "robustness")
TRAINING = ("pretrain", "warmup", "finetune")
# Of these, the ones that have a cell for every task too.
TASK_STAGES = ("warmup", "finetune")

# Sections of params.yaml each stage declares (a grid stage also reads its method's section). `tracking` says only
# where runs are recorded, changes no result, and so is no dependency of any stage. Pre-training reads the tokens
# alone, fine-tuning those of its task: another task trains nothing again but its own models.
SECTIONS = {
    "prepare": ("data", "prepare"),
    "pretrain": ("data.view", "model", "pretrain", "machine"),
    "warmup": ("data.view", "model", "warmup", "machine"),
    "finetune": ("data.view", "model", "finetune", "machine"),
    "robustness": ("data", "model", "finetune", "robustness", "machine"),
    "compute": ("data.view", "model", "pretrain", "finetune", "compute", "machine"),
    "report": ("grid", "data", "report"),
}

# Code each stage depends on. Not among it: cli.py, pipeline/tracking and what starts a stage and records it (execute.py and
# what that imports), which have no part in its results, and what is no stage: the other files of stages/, pipeline/serving.
COMMON_CODE = ("pipeline/errors.py", "pipeline/files.py", "stages/paths.py")
_TRAINING = (
    "pipeline/config.py",
    "pipeline/progress.py",
    "pipeline/ranks.py",
    "pipeline/data",
    "pipeline/models",
    "pipeline/moe",
    "pipeline/training",
    "stages/problems.py",
)
CODE = {
    "prepare": ("pipeline/progress.py", "pipeline/data", "stages/prepare.py"),
    "pretrain": (*_TRAINING, "stages/pretrain.py"),
    "warmup": (*_TRAINING, "stages/warmup.py"),
    "finetune": (*_TRAINING, "stages/finetune.py"),
    "robustness": (*_TRAINING, "pipeline/evaluation", "stages/robustness.py"),
    "compute": (*_TRAINING, "pipeline/evaluation/compute.py", "stages/compute.py"),
    "report": ("pipeline/ranks.py", "pipeline/evaluation", "pipeline/moe", "stages/report.py"),
}

# Stages whose models or results a stage reads.
UPSTREAM = {
    "pretrain": (),
    "warmup": ("pretrain",),
    "finetune": ("warmup",),
    "robustness": ("pretrain", "finetune"),
    "compute": (),
    "report": (*GRID_STAGES, "compute"),
}


def of_images(view: str) -> bool:
    """Whether `data.view` is one of images, and not of text."""
    return view in ("grey", "rgb")


def cells(stage: str, methods: Iterable[str], seeds: Iterable[int], tasks: Iterable[str]) -> "list[Cell]":
    """The cells that a stage has in a grid; prepare and report have none."""
    if stage == "compute":
        return [Cell(method, 0) for method in methods]
    if stage not in GRID_STAGES:
        return []
    of_tasks = tasks if stage in TASK_STAGES else (None,)
    return [Cell(method, seed, task) for method in methods for seed in seeds for task in of_tasks]


def read_result(path: Path) -> dict[str, Any]:
    """What a stage's result file holds: `run_id` and `metrics`. Raises Failure if it is missing or damaged."""
    remedy = "run `dvc repro`"
    result = read_json(path, remedy)
    if not isinstance(result, dict) or not isinstance(result.get("run_id"), str) or not isinstance(result.get("metrics"), dict):
        raise Failure(f"{path}: has no run_id and metrics; {remedy}")
    return result


class Cell(NamedTuple):
    """One cell of the grid: a method trained with a seed, and for the stages of a task this one."""

    method: str
    seed: int
    task: str | None = None

    @property
    def name(self) -> str:
        return f"{self.method}-s{self.seed}" + (f"-{self.task}" if self.task else "")


@dataclass(frozen=True)
class Paths:
    """`root` holds params.yaml and data/; `out` holds what stages write (the same folder under DVC)."""

    root: Path
    out: Path

    @classmethod
    def here(cls) -> "Paths":
        """The repository around the current folder: where DVC started the stage, or the nearest folder with dvc.yaml."""
        try:
            here = Path.cwd()
        except FileNotFoundError:
            raise Failure("the current folder was removed; change into the repository, then run again") from None
        root = next((folder for folder in (here, *here.parents) if os.path.exists(folder / "dvc.yaml")), here)
        return cls(root, root)

    @property
    def data(self) -> Path:
        return self.out / "outputs/data"

    @property
    def source(self) -> Path:
        """What is pre-trained on."""
        return self.data / "source"

    def task(self, name: str) -> Path:
        """A task's examples."""
        return self.data / "tasks" / name

    @property
    def report(self) -> Path:
        return self.out / "report"

    def output(self, stage: str, cell: Cell) -> Path:
        """Folder of a grid stage's large outputs: of a cell without a task, those of all tasks of a stage that has them."""
        return self.out / "outputs" / _place(stage, cell)

    def result(self, stage: str, cell: Cell | None = None) -> Path:
        """Small JSON of a stage's metrics and run id."""
        return self.out / "results" / f"{_place(stage, cell) if cell else stage}.json"

    def inputs(self, stage: str, cell: Cell | None = None) -> list[Path]:
        """What a stage reads besides code, params and the embedded corpus."""
        if stage == "prepare":
            return []
        if stage == "report":
            results = [self.out / "results" / grid_stage for grid_stage in (*GRID_STAGES, "compute")]
            outputs = [self.out / "outputs" / grid_stage for grid_stage in ("pretrain", "finetune", "robustness")]
            return [self.result("prepare"), *results, *outputs]
        if stage in ("pretrain", "compute"):
            return [self.source]
        data = self.task(cell.task) if stage in TASK_STAGES else self.data
        return [data, *(self.output(upstream, cell) for upstream in UPSTREAM[stage])]

    def outputs(self, stage: str, cell: Cell | None = None) -> list[Path]:
        """What a stage writes."""
        if stage == "prepare":
            return [self.data, self.result(stage)]
        if stage == "report":
            return [self.report / name for name in ("report.md", "index.html", "data", "figures")]
        if stage == "compute":
            return [self.result(stage, cell)]
        return [self.output(stage, cell), self.result(stage, cell)]


def _place(stage: str, cell: Cell) -> str:
    if stage == "compute":
        return f"{stage}/{cell.method}"
    place = f"{stage}/{cell._replace(task=None).name}"
    return f"{place}/{cell.task}" if cell.task and stage in TASK_STAGES else place
