"""What machines do to a run: one line, and whatever was good before is still there."""

import fcntl
import json
import os
import re
import resource
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest

from pipeline import config
from pipeline.errors import Failure
from pipeline.files import digest
from pipeline.moe.layer import SETTINGS
from stages.execute import execute
from stages.paths import Cell, Paths
from tests.conftest import REPOSITORY
from tests.stages import repository
from tests.tracking.conftest import DEAD, until

CELL = Cell("vqmoe", 0)


@pytest.fixture
def pretrained(tiny_overrides, tmp_path):
    """A function from overrides to params, and the paths of a repository that is pre-trained."""

    def params(*more):
        return config.load(REPOSITORY / "params.yaml", SETTINGS, (*tiny_overrides, *more))

    paths = Paths(tmp_path / "repository", tmp_path / "repository")
    paths.root.mkdir()
    execute("prepare", params(), paths)
    execute("pretrain", params(), paths, CELL)
    return params, paths


def left(paths):
    good = [paths.output("pretrain", CELL), paths.result("pretrain", CELL)]
    return [digest(path) for path in good], [path for path in paths.root.rglob("*.tmp")]


@pytest.mark.parametrize("override", ["pretrain.batch=30000000000", "model.width=100000000"])
def test_out_of_memory(pretrained, override):
    params, paths = pretrained
    before = left(paths)
    with pytest.raises(Failure, match=r"pretrain vqmoe-s0: out of memory \(.*allocate.*\); lower") as caught:
        execute("pretrain", params(override), paths, CELL)
    assert "\n" not in str(caught.value)
    assert left(paths) == before


def test_a_disk_that_is_full(pretrained, tiny_overrides):
    """A limit to the size of files stands for it: writing fails with an error of the system in the middle of a file."""
    _, paths = pretrained
    (paths.root / "dvc.yaml").write_text("")
    before = left(paths)
    options = [part for override in (*tiny_overrides, "pretrain.clip=2.0") for part in ("-S", override)]
    limit = (paths.output("pretrain", CELL) / "model.safetensors").stat().st_size // 2
    done = subprocess.run(
        [sys.executable, "-c", "from cli import main; main()", "pretrain", "--params", str(REPOSITORY / "params.yaml"), *options],
        cwd=paths.root,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "MLFLOW_TRACKING_URI": "http://127.0.0.1:9"},
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert done.returncode == 1, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("vqmoe:")]
    assert "Traceback" not in done.stderr
    assert sum("a state of the training cannot be kept" in line for line in lines) == 1
    assert "outputs/pretrain/vqmoe-s0: cannot be written (File too large); free space" in lines[-1]
    assert left(paths) == before


def test_a_second_dvc_repro_is_refused_and_the_first_ends_well(tmp_path):
    root = repository.make(tmp_path / "repository", "pretrain.steps=300", "pretrain.validate_every=300")
    first = repository.start(root, "dvc", "repro", "pretrain@smoe-0", MLFLOW_TRACKING_URI=DEAD)
    until(lambda: list(root.glob(".resume/pretrain-*/*.safetensors")))
    os.killpg(first.pid, signal.SIGSTOP)
    second = repository.start(root, "dvc", "repro")
    said, _ = second.communicate()
    os.killpg(first.pid, signal.SIGCONT)
    (line,) = [line for line in said.splitlines() if line.startswith("ERROR: ")]
    assert re.fullmatch(f"ERROR: failed to reproduce 'prepare': '{root}/.*' is busy, it is being blocked by:", line)
    assert f"(PID {first.pid}): " in said
    assert (second.returncode, "Running stage" in said) == (255, False)
    said, _ = first.communicate()
    assert first.returncode == 0, said
    again, _ = repository.start(root, "dvc", "repro", "pretrain@smoe-0").communicate()
    assert "Data and pipelines are up to date." in again


def test_outputs_are_back_when_params_are_mended(tmp_path, warm):
    """dvc removes what a stage is to make before it runs."""
    root = repository.make(tmp_path / "repository")

    def repro():
        process = repository.start(root, "dvc", "repro", "prepare", warm=warm)
        return process.communicate()[0], process.returncode

    assert repro()[1] == 0
    before = {path: digest(root / path) for path in ("outputs/data", "results/prepare.json")}
    repository.set_params(root, "data.tasks={toy: data/taks.csv}")
    said, code = repro()
    assert code and "data.tasks has 'data/taks.csv'" in said and "(did you mean data/task.csv?)" in said
    repository.set_params(root)
    said, code = repro()
    assert code == 0 and "Running stage" not in said
    assert {path: digest(root / path) for path in before} == before


def test_a_lock_file_that_another_dvc_is_writing_is_recorded_whole(tiny_overrides, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", DEAD)
    lock, guard = tmp_path / "dvc.lock", tmp_path / ".dvc/tmp/lock"
    guard.parent.mkdir(parents=True)
    lock.write_text("ha")
    writer = guard.open("w")
    fcntl.flock(writer, fcntl.LOCK_EX)

    def flock(reader, how):
        try:
            fcntl.flock(reader, how)
        except BlockingIOError:
            lock.write_text("half")
            writer.close()
            raise

    monkeypatch.setattr("stages.execute.fcntl", SimpleNamespace(flock=flock, LOCK_SH=fcntl.LOCK_SH, LOCK_NB=fcntl.LOCK_NB))
    params = config.load(REPOSITORY / "params.yaml", SETTINGS, tiny_overrides)
    execute("prepare", params, Paths(tmp_path, tmp_path))
    # What dvc writes next into the same file is another run's.
    lock.write_text("other")
    (journal,) = (tmp_path / ".mlflow/spool").glob("*.jsonl")
    operations = map(json.loads, journal.read_text().splitlines())
    assert [one["text"] for one in operations if one.get("name") == "dvc.lock"] == ["half"]
