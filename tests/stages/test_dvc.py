"""dvc.yaml against stages/paths.py, and both against what the code really imports."""

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from stages.paths import CODE, COMMON_CODE, GRID_STAGES, SECTIONS, TASK_STAGES, Cell, Paths
from tests.conftest import REPOSITORY

STAGES = YAML(typ="safe").load((REPOSITORY / "dvc.yaml").read_text())["stages"]
GRID = {"method": "${grid.methods}", "seed": "${grid.seeds}", "task": "${data.tasks}"}
PATHS = Paths(Path(), Path())


def _names(entries):
    return [next(iter(entry)) if isinstance(entry, dict) else entry for entry in entries]


@pytest.mark.parametrize("stage", STAGES)
def test_params_inputs_outputs_and_code(stage):
    declared = STAGES[stage]
    depth = 3 if stage in TASK_STAGES else 2 if stage in GRID_STAGES else 1 if stage == "compute" else 0
    axes = {key: GRID[key] for key in list(GRID)[:depth]}
    assert declared.get("matrix", {}) == axes
    item = {key: f"${{item.{key}}}" for key in axes}
    cell = Cell(**({"seed": 0} | item)) if item else None
    assert declared["params"] == [*SECTIONS[stage], *(["methods.${item.method}"] if item else [])]
    embedded = ["data"] if stage == "prepare" else []
    assert set(declared["deps"]) == {*embedded, *map(str, PATHS.inputs(stage, cell)), *COMMON_CODE, *CODE[stage]}
    outputs = [*_names(declared.get("outs", [])), *_names(declared.get("metrics", [])), *_names(declared.get("plots", []))]
    assert outputs == list(map(str, PATHS.outputs(stage, cell)))
    assert declared["cmd"] == f"PYTHONPATH=. vqmoe {stage}" + "".join(f" --{key} {value}" for key, value in item.items())


@cache
def _imports(module: str) -> tuple[str, list[str]] | None:
    """File of a module of this repository, and what it imports, found without running it; None for other modules."""
    path = REPOSITORY / (module.replace(".", "/") + ".py")
    if not path.exists():
        path = REPOSITORY / module.replace(".", "/") / "__init__.py"
    if not path.exists():
        return None
    names: list[str] = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return str(path.relative_to(REPOSITORY)), names


def _imported(module: str) -> set[str]:
    """Files of this repository that importing a module reaches."""
    found: set[str] = set()
    waiting = [module]
    while waiting:
        file, names = _imports(waiting.pop()) or ("", [])
        if file not in found:
            found.add(file)
            waiting += names
    return found - {""}


@pytest.mark.parametrize("stage", STAGES)
def test_every_imported_file_is_a_dependency_and_every_code_dependency_is_imported(stage):
    declared = [dep for dep in STAGES[stage]["deps"] if dep.startswith(("pipeline", "stages"))]
    reached = {file for file in _imported(f"stages.{stage}") if (REPOSITORY / file).stat().st_size}
    covered = {file for file in reached if any(file == dep or file.startswith(dep + "/") for dep in declared)}
    assert covered == reached
    idle = [dep for dep in declared if not any(file == dep or file.startswith(dep + "/") for file in reached)]
    assert not idle


def test_editing_a_plot_trains_nothing():
    for stage in ("prepare", "pretrain", "warmup", "finetune"):
        assert "pipeline/evaluation" not in STAGES[stage]["deps"]


def test_nothing_imports_the_command_line():
    # import-linter's contracts hold packages to one way; cli.py is a module, which it does not take.
    for path in [*(REPOSITORY / "pipeline").rglob("*.py"), *(REPOSITORY / "stages").rglob("*.py")]:
        name = str(path.relative_to(REPOSITORY)).removesuffix(".py").replace("/", ".")
        assert "cli.py" not in _imported(name), name


def test_training_on_text_loads_nothing_that_only_others_need():
    """Each of them takes a second or more of every stage."""
    code = "import sys, stages.pretrain, stages.execute; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert not {"torchvision", "sklearn", "scipy", "pandas", "mlflow", "matplotlib"} & set(done.stdout.split())
