"""Cells side by side: with a stand-in for dvc that tells what it was asked, and whole."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
from filelock import FileLock

from pipeline import config
from pipeline.errors import Failure, UsageError
from pipeline.files import digest
from pipeline.moe.layer import SETTINGS
from stages import grid
from stages.execute import execute
from stages.paths import GRID_STAGES, Paths, cells
from tests.conftest import REPOSITORY
from tests.stages import repository
from tests.tracking.conftest import DEAD, until

PARAMS = SimpleNamespace(
    grid=SimpleNamespace(methods=("vqmoe", "smoe"), seeds=(0, 1)), data=SimpleNamespace(tasks={"era": "era", "toy": "toy"})
)
# Writes when it began and ended with what; "" is the last dvc, which is given no stages.
DVC = """
import os, sys, time
def tell(what):
    with open("told", "a") as file:
        file.write(f"{what} {' '.join(sys.argv[1:])} threads={os.environ['OMP_NUM_THREADS']}\\n")
tell("begin")
time.sleep(0.3)
print("printed", sys.argv[-1])
tell("end")
sys.exit("pretrain@smoe-0" in sys.argv and os.path.exists("fail"))
"""


@pytest.fixture
def dvc(tmp_path, monkeypatch):
    script = tmp_path / "dvc"
    script.write_text(DVC)
    monkeypatch.setattr(grid, "REPRO", (sys.executable, str(script)))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    return script


def told(root):
    """Calls in the order in which they began, how many ran at a time at most, and the threads they were given."""
    running, most, calls = 0, 0, []
    for line in (root / "told").read_text().splitlines():
        what, _, rest = line.partition(" ")
        running += 1 if what == "begin" else -1
        most = max(most, running)
        calls += [rest.rpartition("threads=")[0].split()] if what == "begin" else []
    return calls, most, {line.rpartition("=")[2] for line in (root / "told").read_text().splitlines()}


@pytest.mark.parametrize("jobs", [1, 3])
def test_cells_run_so_many_at_a_time_between_what_runs_alone(dvc, tmp_path, jobs, capfd):
    grid.grid(PARAMS, tmp_path, jobs)
    (first, *calls, last), most, threads = told(tmp_path)
    assert (first, last, most) == (["prepare"], [], jobs)
    assert sorted(call[1] for call in calls) == ["pretrain@smoe-0", "pretrain@smoe-1", "pretrain@vqmoe-0", "pretrain@vqmoe-1"]
    (call,) = [call for call in calls if "pretrain@smoe-1" in call]
    tasks = [f"{stage}@smoe-1-{task}" for stage in ("warmup", "finetune") for task in ("era", "toy")]
    assert call == ["--single-item", "pretrain@smoe-1", *tasks, "robustness@smoe-1"]
    assert threads == {str(max(1, len(os.sched_getaffinity(0)) // jobs))}
    printed = capfd.readouterr().out
    assert f"OMP_NUM_THREADS={threads.pop()};" in printed
    assert re.findall(r": done in \d+ s, (\d of 4), about", printed) == ["1 of 4", "2 of 4", "3 of 4", "4 of 4"]
    assert ", 4 of 4, about 0 s left\n" in printed
    assert (tmp_path / "outputs/logs/smoe-s1.log").read_text() == "printed robustness@smoe-1\n"


def test_threads_that_are_set_are_kept(dvc, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    grid.grid(PARAMS, tmp_path, 2)
    assert told(tmp_path)[2] == {"7"}


def test_chosen_cells_run_alone(dvc, tmp_path):
    grid.grid(PARAMS, tmp_path, 2, ("smoe-s1", "vqmoe-s0"))
    calls, _, _ = told(tmp_path)
    assert sorted(call[1] for call in calls[1:]) == ["pretrain@smoe-1", "pretrain@vqmoe-0"]
    with pytest.raises(UsageError, match="no cell 'smoe-s2' in the grid; there are: vqmoe-s0, vqmoe-s1, smoe-s0, smoe-s1"):
        grid.grid(PARAMS, tmp_path, 2, ("smoe-s2",))


def test_a_cell_that_fails_is_told_and_the_others_go_on(dvc, tmp_path, capfd):
    (tmp_path / "fail").touch()
    with pytest.raises(Failure, match="1 of 4 cells failed: smoe-s0; mend") as caught:
        grid.grid(PARAMS, tmp_path, 2)
    assert caught.value.exit_code == 1
    calls, _, _ = told(tmp_path)
    assert len(calls) == 5 and [] not in calls
    printed = capfd.readouterr()
    assert printed.err == "vqmoe: smoe-s0: failed after 0 s; see outputs/logs/smoe-s0.log\n"
    assert printed.out.count(": done in ") == 3


def test_one_at_a_time_in_a_repository(dvc, tmp_path):
    (tmp_path / "outputs/logs").mkdir(parents=True)
    with FileLock(tmp_path / "outputs/logs/.lock"), pytest.raises(Failure, match="another `vqmoe grid` is at work here; wait"):
        grid.grid(PARAMS, tmp_path, 2)
    shutil.rmtree(tmp_path / "outputs")
    (tmp_path / "outputs").write_text("")
    with pytest.raises(Failure, match=r"outputs/logs: cannot be written \("):
        grid.grid(PARAMS, tmp_path, 2)
    assert not (tmp_path / "told").exists()


# As dvc does it: an interrupt is for its stage, which it waits for. A stage that is not interrupted ends with its dvc.
WAITING = """
import os, signal, subprocess, sys
if sys.argv[1:] == ["prepare"]:
    sys.exit()
stage = '''
import os, time
from stages.orphan import stop_with_dvc
stop_with_dvc()
open(f"stage-{os.getpid()}", "w").close()
time.sleep(60)
'''
process = subprocess.Popen([sys.executable, "-c", stage], env=os.environ | {"DVC_STAGE": "s"})
signal.signal(signal.SIGINT, signal.SIG_IGN)
process.wait()
"""


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left_running(dvc, tmp_path, stop):
    dvc.write_text(WAITING)
    code = f"""
import sys
from types import SimpleNamespace as N
from stages import grid
grid.REPRO = (sys.executable, {str(dvc)!r})
grid.grid(N(grid=N(methods=("vqmoe", "smoe", "xmoe"), seeds=(0,)), data=N(tasks={{}})), grid.Path.cwd(), 2)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        stderr=subprocess.DEVNULL,
        # A shell starts what runs in the background so.
        preexec_fn=(lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)) if stop == signal.SIGTERM else None,
    )
    until(lambda: len(list(tmp_path.glob("stage-*"))) == 2)
    process.send_signal(stop)
    process.wait(30)
    pids = [path.name.removeprefix("stage-") for path in tmp_path.glob("stage-*")]
    assert len(pids) == 2
    if stop == signal.SIGKILL:
        until(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in pids), 10)
    assert not any(os.path.exists(f"/proc/{pid}") for pid in pids)
    assert "Traceback" in (tmp_path / "outputs/logs/vqmoe-s0.log").read_text() or stop == signal.SIGKILL


def test_two_cells_at_a_time_make_what_one_after_the_other_makes(tmp_path, one_thread, warm, monkeypatch):
    root = repository.make(tmp_path / "repository", "pretrain.steps=11")
    # Changed and not committed, as params mostly are.
    repository.set_params(root)
    # What runs last, and alone, takes as long as the rest.
    stages = (root / "dvc.yaml").read_text().partition("  compute:\n")[0]
    (root / "dvc.yaml").write_text(stages)
    done = repository.start(root, "vqmoe", "grid", "--jobs", "2", warm=warm)
    printed, _ = done.communicate()
    assert done.returncode == 0, printed
    assert "up to date" in repository.start(root, "dvc", "status").communicate()[0]

    from pipeline.tracking import store

    client, found = store.connect(root), {}
    for experiment in client.search_experiments():
        for run in client.search_runs([experiment.experiment_id]):
            assert run.data.tags["dvc.stage"] not in found
            found[run.data.tags["dvc.stage"]] = run
    names = {f"{stage}@{cell}" for cell in ("vqmoe-0", "smoe-0") for stage in ("pretrain", "robustness")}
    names |= {f"{stage}@{cell}-toy" for cell in ("vqmoe-0", "smoe-0") for stage in ("warmup", "finetune")}
    assert found.keys() == {"prepare"} | names
    assert {run.info.status for run in found.values()} == {"FINISHED"}
    assert {run.data.tags["vqmoe.threads"] for run in found.values()} == {"1"}
    for method in ("vqmoe", "smoe"):
        tags = found[f"finetune@{method}-0-toy"].data.tags
        assert tags["vqmoe.upstream.warmup"] == found[f"warmup@{method}-0-toy"].info.run_id
        assert tags["vqmoe.git_dirty"] == "true"

    monkeypatch.setenv("MLFLOW_TRACKING_URI", DEAD)
    paths, alone = Paths(root, root), Paths(root, tmp_path / "alone")
    params = config.load(root / "params.yaml", SETTINGS)
    execute("prepare", params, alone)
    for stage in GRID_STAGES:
        for cell in cells(stage, params.grid.methods, params.grid.seeds, params.data.tasks):
            execute(stage, params, alone, cell)
            made, before = (json.loads(one.result(stage, cell).read_text()) for one in (paths, alone))
            assert digest(paths.output(stage, cell)) == digest(alone.output(stage, cell)), (stage, cell)
            assert made["metrics"] == before["metrics"]
            target = f"{stage}@{'-'.join(str(part) for part in cell if part is not None)}"
            assert made["run_id"] == found[target].info.run_id


def test_make_asks_for_as_many_jobs():
    # Tests are run by make themselves: what that one says to those it starts is not for this one.
    surroundings = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    for options, command in (([], "dvc repro"), (["JOBS=3"], "vqmoe grid --jobs 3")):
        done = subprocess.run(
            ["make", "--dry-run", "repro", *options],
            cwd=REPOSITORY,
            env=surroundings,
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.splitlines()[-1] == command
