"""Commands that share their training steps among processes of this machine."""

import os
import re
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest

from pipeline.files import read_json
from pipeline.tracking import store
from tests.stages import repository

pytestmark = pytest.mark.skipif(not os.path.exists("/proc"), reason="looks for processes in /proc")


def test_all_stages_of_a_method(tmp_path, warm):
    root = repository.make(tmp_path, "grid.methods=[vqmoe]", "finetune.scratch=true", "machine.processes=2")
    process = repository.start(root, "vqmoe", "train", "--seed", "0", warm=warm)
    said = process.communicate()[0]
    assert process.returncode == 0, said
    (out,) = (root / "runs").iterdir()
    assert (out / "report/report.md").exists()
    assert said.count(f"Models and results: {out}") == 1
    assert read_json(out / "results/finetune/vqmoe-s0/toy.json", "")["metrics"]["scratch"]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, warm):
    root = repository.make(tmp_path_factory.mktemp("launch"), "grid.methods=[smoe]", "grid.seeds=[0]", "machine.processes=2")
    assert repository.start(root, "vqmoe", "prepare", warm=warm).wait() == 0
    return root


def pretrain(root, *overrides):
    return repository.start(root, "vqmoe", "pretrain", *(f"-S{override}" for override in overrides))


def ranks_of(root):
    """Processes that train in the repository, by rank."""
    found = {}
    for place in os.listdir("/proc"):
        try:
            if place.isdigit() and os.readlink(f"/proc/{place}/cwd") == str(root):
                environment = open(f"/proc/{place}/environ").read().split("\0")
                found |= {int(line[5:]): int(place) for line in environment if line.startswith("RANK=")}
        except OSError:
            continue
    return found


def test_two_processes_are_one_run_with_almost_the_metrics_of_one(prepared):
    result, told = prepared / "results/pretrain/smoe-s0.json", []
    for processes in (1, 2):
        process = pretrain(prepared, "model.dropout=0.0", f"machine.processes={processes}")
        told.append(process.communicate()[0])
        assert process.returncode == 0, told[-1]
        metrics = read_json(result, "")["metrics"]["test"]["bpc"]
        told[-1] = (told[-1].count("12/12"), metrics)
    (lines, alone), (lines_of_two, shared) = told
    assert lines == lines_of_two == 1
    assert shared == pytest.approx(alone, abs=1e-4) and shared != 0
    assert not os.listdir(prepared / ".resume")
    client = store.connect(prepared)
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    runs = client.search_runs(experiments, "tags.`vqmoe.stage` = 'pretrain'")
    assert [run.data.params["machine.processes"] for run in runs] == ["2", "1"]
    assert {run.info.status for run in runs} == {"FINISHED"}


@pytest.mark.parametrize(
    "overrides, code, line",
    [
        (["pretrain.batch=3"], 2, r"machine\.processes is 2: must divide pretrain\.batch \(3\)"),
        (["pretrain.learning_rate=1e30", "pretrain.clip=1e30"], 1, r"is (nan|inf) at step \d+; lower learning_rate"),
    ],
)
def test_what_goes_wrong_is_one_line(prepared, overrides, code, line):
    process = pretrain(prepared, *overrides)
    said = process.communicate()[0]
    assert process.returncode == code
    told = [one for one in said.splitlines() if one.startswith("vqmoe:")]
    assert len(told) == 1 and re.search(line, told[0]), said
    assert "Traceback" not in said and "torch" not in said, said


def start_long(root):
    """A training of two processes that has gone some steps."""
    shutil.rmtree(root / ".resume")
    process = pretrain(root, "pretrain.steps=100000")
    until = time.monotonic() + 60
    while len(ranks_of(root)) < 2 or not any((root / ".resume").glob("*/*.safetensors")):
        assert time.monotonic() < until and process.poll() is None, process.communicate()[0]
        time.sleep(0.2)
    return process


def test_a_process_that_dies_ends_the_others(prepared):
    process = start_long(prepared)
    os.kill(ranks_of(prepared)[1], signal.SIGKILL)
    said = process.communicate()[0]
    assert process.returncode not in (0, -9) and "Traceback" not in said, said


@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_processes_end_with_the_command_that_started_them(prepared, stop):
    process = start_long(prepared)
    os.kill(process.pid, stop)
    said = process.communicate()[0]  # ends once nobody is left to write
    assert process.returncode == {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}[stop], said
    assert not ranks_of(prepared)
    assert "Traceback" not in said, said


def test_many_machines_start_it_by_torchrun(prepared):
    """Two torchruns that meet at a port, as on two machines."""
    port = str(29_000 + os.getpid() % 1000)
    meet = "--nnodes 2 --nproc-per-node 1 --rdzv-backend c10d --local-addr localhost --rdzv-endpoint".split()
    script = str(Path(sys.executable).parent / "vqmoe")
    command = ["torchrun", *meet, f"localhost:{port}", script, "pretrain", "-Smodel.dropout=0.0"]
    started = [repository.start(prepared, *command) for _ in range(2)]
    said = [process.communicate()[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], said
    assert sum("12/12" in text for text in said) == 1
