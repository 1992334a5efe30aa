"""Promises of SECURITY.md that the code itself shows."""

import ast
import re
import subprocess
import sys

import pytest
from ruamel.yaml import YAML

from pipeline import config
from pipeline.errors import UsageError
from pipeline.moe.layer import SETTINGS
from tests.conftest import REPOSITORY

FOLDERS = ("pipeline", "stages", "docs", "benchmarks")
SOURCES = [*REPOSITORY.glob("*.py"), *(path for folder in FOLDERS for path in REPOSITORY.joinpath(folder).rglob("*.py"))]
FORBIDDEN = {
    *("pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve"),
    *("os.system", "os.popen", "eval", "exec", "torch.load", "np.fromfile"),
}


def calls(tree):
    """Dotted names of what is called or imported, and the keywords of calls."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, {}) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module, {}
        elif isinstance(node, ast.Call):
            yield ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(REPOSITORY).as_posix())
def test_nothing_is_unpickled_or_goes_through_a_shell(path):
    for name, words in calls(ast.parse(path.read_text())):
        assert name not in FORBIDDEN, name
        assert words.get("shell", "False") == "False", name
        assert words.get("allow_pickle", "False") == "False", name
        if name in ("np.load", "numpy.load"):
            assert words.get("allow_pickle") == "False"
        if name == "YAML":
            assert words.get("typ", "'safe'") == "'safe'"
        if name.endswith(("extractall", "extract")):
            assert "'data'" in words.get("filter", ""), name


@pytest.mark.parametrize(
    "text", ["!!python/object/apply:os.system [touch x]", "!!python/name:os.system", "!<tag:yaml.org,2002:python/module:os> x"]
)
def test_yaml_makes_no_objects(tmp_path, text):
    path = tmp_path / "params.yaml"
    path.write_text((REPOSITORY / "params.yaml").read_text().replace("experiment: vqmoe", f"experiment: {text}"))
    with pytest.raises(UsageError):
        config.load(path, SETTINGS)
    assert not (tmp_path / "x").exists()


def test_what_dvc_puts_into_its_commands_cannot_be_more_than_a_name():
    stages = YAML(typ="safe").load((REPOSITORY / "dvc.yaml").read_text())["stages"]
    items = {item for stage in stages.values() for item in re.findall(r"\$\{(.*?)\}", stage["cmd"])}
    assert items == {"item.method", "item.seed", "item.task"}
    for name in ("a b", "a;b", "$(x)", "a/../b", "-x", ""):
        with pytest.raises(UsageError):
            config.load(REPOSITORY / "params.yaml", SETTINGS, [f"data.tasks={{'{name}': era}}"])


def test_telemetry_is_off():
    assert "analytics = false" in (REPOSITORY / ".dvc/config").read_text()
    assert "check_update = false" in (REPOSITORY / ".dvc/config").read_text()
    code = "import os; from pipeline.tracking import store; store.prepare_environment(); print(os.environ['DO_NOT_TRACK'])"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout == "true\n"
