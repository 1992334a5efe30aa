"""Stores that fail, runs that are killed: nothing is lost, and nothing stands there twice."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from click.testing import CliRunner

from cli import main
from pipeline import tracking
from pipeline.errors import Failure
from pipeline.tracking import run as run_module
from pipeline.tracking import store
from tests.conftest import REPOSITORY
from tests.tracking.conftest import DEAD, die, fill, runs, steps, stored, told, until

CHILD = (
    "import sys, time, pathlib\nfrom pipeline import tracking\nfrom pipeline.tracking import run as run_module\n"
    "run_module.SEND_SECONDS = 0.05\n"
    "with tracking.start(pathlib.Path(sys.argv[1]), key='pretrain', resumed=False, experiment='t', stage='pretrain',\n"
    "        name='vqmoe-s0', params={'model.width': 8, 'seed': 0}) as run:\n"
    "    for step in range(1, 51):\n        run.log({'a': step}, step)\n"
    "    print(run.id, flush=True)\n    time.sleep(60)\n"
)


def _spool(root):
    return sorted(path.name for path in (root / ".mlflow/spool").iterdir())


def _offline(begin, monkeypatch, body=lambda run: None, **more):
    """A run while the store is out of reach."""
    with monkeypatch.context() as away:
        away.setenv("MLFLOW_TRACKING_URI", DEAD)
        with begin(**more) as run:
            body(run)
    assert run.id.startswith("offline-")
    return run


def test_what_was_recorded_offline_is_sent_by_sync_whole(root, begin, monkeypatch, capsys):
    with begin(key="reference") as reference:
        fill(reference, root / "model")
    run = _offline(begin, monkeypatch, lambda run: fill(run, root / "model"))
    shutil.rmtree(root / "model")  # as `dvc repro` replaces outputs
    started = json.loads((root / ".mlflow/spool/pretrain.jsonl").read_text().splitlines()[0])["time"]
    monkeypatch.chdir(root)
    result = CliRunner().invoke(main, ["track", "sync"])
    assert result.exit_code == 0, result.output
    assert "sent: pretrain" in result.output
    client = store.connect(root)
    (found,) = [one for one in runs(client) if one.data.tags["vqmoe.offline_id"] == run.id]
    assert found.info.start_time == started
    here, there = told(client, found.info.run_id), told(client, reference.id)
    for name in ("params", "tags", "datasets", "artifacts"):
        assert here[name] == there[name]
    for name, points in there["points"].items():
        assert [point[:2] for point in here["points"][name]] == [point[:2] for point in points]
    assert [model[:2] for model in here["models"]] == [("pretrain-vqmoe-s0", "READY")]
    assert here["params"] == {"model.width": "8", "seed": "0"}
    assert here["artifacts"] == ["table.csv"]
    assert here["info"][0] == "FINISHED"
    assert _spool(root) == []
    assert "Nothing is left to send" in CliRunner().invoke(main, ["track", "sync"]).output


def test_what_is_sent_again_stands_there_once(root, begin, monkeypatch):
    _offline(begin, monkeypatch, lambda run: fill(run, root / "model"))
    spool, kept = root / ".mlflow/spool", root / "kept"
    shutil.copytree(spool, kept)
    tracking.sync(root)
    client = store.connect(root)
    (run,) = runs(client)
    once = told(client, run.info.run_id)
    assert once["points"]["train/loss"][-1][0] == 30
    assert len(once["points"]["test/bpc"]) == 1
    assert [model[2][0][:2] for model in once["models"]] == [("test/bpc", 1.5)]
    # As if the power had failed before anything, or half of it, was marked as sent.
    journal = (kept / "pretrain.jsonl").read_bytes()
    for offset in (0, journal.index(b"\n", len(journal) // 2) + 1):
        shutil.rmtree(spool)
        shutil.copytree(kept, spool)
        if offset:
            (sent,) = [f"{run.data.tags['vqmoe.offline_id']}.sent.json"]
            (spool / sent).write_text(json.dumps({"run_id": run.info.run_id, "offset": offset}))
        tracking.sync(root)
        assert [one.info.run_id for one in runs(client)] == [run.info.run_id]
        assert told(client, run.info.run_id) == once


def test_each_request_may_fail_after_it_came_through(root, begin, monkeypatch):
    """Whatever call of the client it is: its answer gets lost once, and all of it is tried again."""
    from mlflow import MlflowClient

    lost = set()

    def losing(name):
        original = getattr(MlflowClient, name)

        def call(self, *arguments, **more):
            result = original(self, *arguments, **more)
            if name not in lost:
                lost.add(name)
                raise ConnectionError(f"the answer to {name} was lost")
            return result

        return call

    names = ["create_experiment", "create_run", "log_batch", "log_inputs", "log_artifact", "create_logged_model"]
    names += ["log_model_artifacts", "finalize_logged_model", "log_outputs", "update_run", "set_terminated"]
    monkeypatch.setattr(run_module, "BREAK_SECONDS", 0.01)
    for name in names:
        monkeypatch.setattr(MlflowClient, name, losing(name))
    with begin() as run:
        fill(run, root / "model")
        until(lambda: set(names) - lost == {"set_terminated"})
    tracking.sync(root)
    assert lost == set(names)
    client = store.connect(root)
    (found,) = runs(client)
    once = told(client, found.info.run_id)
    assert once["info"][0] == "FINISHED"
    assert [point[0] for point in once["points"]["train/loss"]] == list(range(1, 31))
    assert (len(once["models"]), len(once["outputs"]), len(once["datasets"]), once["artifacts"]) == (1, 1, 1, ["table.csv"])


def test_a_dataset_that_another_process_makes_in_between_is_no_failure(root, begin, monkeypatch, capsys):
    """What a database says then; two runs that begin at once on data that are new to it meet so."""
    from mlflow import MlflowClient
    from mlflow.exceptions import BAD_REQUEST, MlflowException

    original, refused = MlflowClient.log_inputs, []

    def refusing_once(self, *arguments, **more):
        if not refused:
            refused.append(True)
            raise MlflowException('duplicate key value violates unique constraint "dataset_pk"', BAD_REQUEST)
        return original(self, *arguments, **more)

    monkeypatch.setattr(MlflowClient, "log_inputs", refusing_once)
    with begin() as run:
        fill(run, root / "model")
    assert refused and "cannot record" not in capsys.readouterr().err
    assert len(told(store.connect(root), run.id)["datasets"]) == 1


def test_the_next_run_sends_what_others_left(root, begin, monkeypatch):
    left = [_offline(begin, monkeypatch, lambda run: run.log({"a": 1.0}, 1), key=key) for key in ("one", "two")]
    with begin(key="three") as run:
        until(lambda: _spool(root) and all(name.startswith(("three", run._offline_id)) for name in _spool(root)))
    found = {one.data.tags["vqmoe.offline_id"]: one for one in runs(store.connect(root))}
    assert {found[one.id].info.status for one in left} == {"FINISHED"}
    assert len(found) == 3
    assert _spool(root) == []


def test_a_journal_that_cannot_be_sent_keeps_no_other_back(root, begin, monkeypatch, capsys):
    _offline(begin, monkeypatch, lambda run: run.log({"a": 1.0}, 1), key="a-deleted", experiment="gone")
    _offline(begin, monkeypatch, lambda run: [run.log({"a": 1.0}, step) for step in range(9)], key="b-damaged")
    _offline(begin, monkeypatch, lambda run: run.log({"a": 1.0}, 1), key="c-good")
    client = store.connect(root)
    client.delete_experiment(client.create_experiment("gone/pretrain"))
    damaged = root / ".mlflow/spool/b-damaged.jsonl"
    lines = damaged.read_bytes().splitlines(keepends=True)
    damaged.write_bytes(b"".join([*lines[:4], b"\0" * 20 + b"\n", *lines[5:]]))
    capsys.readouterr()
    with pytest.raises(Failure, match="runs sent: 1, not sent: 2"):
        tracking.sync(root)
    printed = capsys.readouterr()
    assert "sent: c-good" in printed.out
    first, second = printed.err.splitlines()
    assert "a-deleted.jsonl: cannot be sent" in first
    assert "b-damaged.jsonl: cannot be sent (damaged at byte" in second
    assert len([name for name in _spool(root) if name.endswith(".jsonl")]) == 2
    good, damaged = sorted(runs(client), key=lambda one: one.data.metrics["a"])
    assert "FINISHED" in (good.info.status, damaged.info.status)


def test_sync_says_when_the_store_is_out_of_reach(root, begin, monkeypatch):
    _offline(begin, monkeypatch)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@127.0.0.1:9")
    monkeypatch.chdir(root)
    result = CliRunner().invoke(main, ["track", "sync"])
    assert result.exit_code == 1
    (line,) = result.output.splitlines()
    assert line.startswith("vqmoe: http://127.0.0.1:9: cannot be reached (")
    assert "secret" not in line
    assert "pretrain.jsonl" in _spool(root)


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_process_goes_on_with_its_run(root, begin, sent):
    process = subprocess.Popen([sys.executable, "-c", CHILD, str(root)], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
    run_id = process.stdout.readline().strip()
    process.send_signal(sent)
    process.wait(60)
    client = store.connect(root)
    assert stored(root, run_id).info.status == ("RUNNING" if sent == signal.SIGKILL else "KILLED")
    with begin(key="another"):  # of another stage: it closes what is dead
        until(lambda: stored(root, run_id).info.status == "KILLED")
    last = max(point.timestamp for point in client.get_metric_history(run_id, "a"))
    assert stored(root, run_id).info.end_time >= last
    with begin(resumed=True) as run:
        for step in range(41, 81):  # from its last checkpoint
            run.log({"a": step}, step)
        until(lambda: stored(root, run_id).info.status == "RUNNING")
    found = stored(root, run_id)
    assert run.id == run_id
    assert found.info.status == "FINISHED"
    assert "vqmoe.error" not in found.data.tags
    assert steps(client, run_id, "a") == list(range(1, 81))
    assert _spool(root) == []


@pytest.mark.parametrize("forgotten", ["nothing", "marks", "journal", "tail"])
def test_each_step_stands_there_once_whatever_the_disk_forgot(root, begin, forgotten):
    with begin() as run:
        for step in range(1, 51):
            run.log({"a": step, "b": -step}, step)
        run_id = run.id
        die(run)
    journal = root / ".mlflow/spool/pretrain.jsonl"
    if forgotten == "marks":
        (root / f".mlflow/spool/{run._offline_id}.sent.json").unlink()
    elif forgotten == "journal":
        tracking.sync(root)
        assert _spool(root) == []
    elif forgotten == "tail":
        journal.write_bytes(b"".join(journal.read_bytes().splitlines(keepends=True)[:20]) + b'{"op": "lo')
    with begin(resumed=True) as again:
        for step in range(11, 61):
            again.log({"a": step, "b": -step}, step)
    assert again.id == run_id
    client = store.connect(root)
    assert [one.info.status for one in runs(client)] == ["FINISHED"]
    assert steps(client, run_id, "a") == steps(client, run_id, "b") == list(range(1, 61))


def test_a_run_goes_on_offline_and_stands_there_once_in_the_end(root, begin, monkeypatch):
    with begin() as run:
        for step in range(1, 51):
            run.log({"a": step}, step)
        run_id = run.id
        die(run)
    for first, last in ((41, 70), (61, 90)):
        with monkeypatch.context() as away:
            away.setenv("MLFLOW_TRACKING_URI", DEAD)
            with begin(resumed=True) as again:
                for step in range(first, last + 1):
                    again.log({"a": step}, step)
                assert again.id == run_id
                if last < 90:
                    die(again)
    tracking.sync(root)
    client = store.connect(root)
    assert [one.info.status for one in runs(client)] == ["FINISHED"]
    assert steps(client, run_id, "a") == list(range(1, 91))


def test_a_run_that_does_not_go_on_is_closed_and_a_new_one_made(root, begin):
    ids = []
    for number in range(2):
        with begin() as run:
            run.log({"a": number}, 1)
            ids.append(run.id)
            die(run)
        if number == 0:
            assert stored(root, ids[0]).info.status == "RUNNING"
    assert stored(root, ids[0]).info.status == "KILLED"
    with begin(resumed=True) as run:
        run.log({"a": 2.0}, 2)
    assert run.id == ids[1] != ids[0]
    client = store.connect(root)
    tracking.sync(root)
    assert {one.info.run_id: one.info.status for one in runs(client)} == {ids[0]: "KILLED", ids[1]: "FINISHED"}
    assert (steps(client, ids[0], "a"), steps(client, ids[1], "a")) == ([1], [1, 2])
    assert _spool(root) == []


def test_a_new_run_of_the_key_takes_its_place_offline_too(root, begin, monkeypatch):
    first = _offline(begin, monkeypatch, lambda run: (run.log({"a": 1.0}, 1), die(run)))
    second = _offline(begin, monkeypatch, lambda run: run.log({"a": 2.0}, 1))
    tracking.sync(root)
    found = {one.data.tags["vqmoe.offline_id"]: one for one in runs(store.connect(root))}
    assert {key: one.info.status for key, one in found.items()} == {first.id: "KILLED", second.id: "FINISHED"}
    assert (found[first.id].data.metrics["a"], found[second.id].data.metrics["a"]) == (1.0, 2.0)
    assert _spool(root) == []


def test_a_finished_run_does_not_go_on_nor_does_one_before_it(root, begin):
    with begin() as dead:
        dead.log({"a": 1.0}, 1)
        assert dead.id
        die(dead)
    with begin() as finished:
        finished.log({"a": 1.0}, 1)
    tracking.sync(root)
    with begin(resumed=True) as new:
        new.log({"a": 1.0}, 1)
    assert len({dead.id, finished.id, new.id}) == 3
    found = {one.info.run_id: one.info.status for one in runs(store.connect(root))}
    assert found == {dead.id: "KILLED", finished.id: "FINISHED", new.id: "FINISHED"}


def test_a_run_that_lives_is_left_alone(root, begin):
    with begin() as first:
        first.log({"a": 1.0}, 1)
        tracking.sync(root)
        with begin(resumed=True) as second:
            second.log({"a": 2.0}, 2)
        assert stored(root, first.id).info.status == "RUNNING"
        assert second.id != first.id
    assert steps(store.connect(root), first.id, "a") == [1]


def test_runs_of_another_place_are_left_alone(root, begin, tmp_path_factory, monkeypatch):
    """Two clones that share a server, and a key."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store.tracking_uri(root))
    other = tmp_path_factory.mktemp("other")
    with begin() as first:
        assert first.id
        with tracking.start(other, key="pretrain", resumed=True, experiment="t", stage="pretrain", name="n", params={}) as second:
            assert second.id != first.id
        assert stored(root, first.id).info.status == "RUNNING"
    assert stored(root, first.id).info.status == "FINISHED"


def test_a_clock_that_jumps_back_confuses_nothing(root, begin, monkeypatch):
    with begin() as run:
        run.log({"a": 1.0}, 1)
        run_id = run.id
        with monkeypatch.context() as jump:
            now = time.time()
            jump.setattr(time, "time", lambda: now - 3600)
            run.log({"a": 2.0}, 2)
        die(run)
    monkeypatch.setattr(time, "time", lambda: now - 7200)
    with begin(resumed=True) as run:
        run.log({"a": 3.0}, 3)
    assert run.id == run_id
    client = store.connect(root)
    times = [point.timestamp for point in client.get_metric_history(run_id, "a")]
    info = stored(root, run_id).info
    assert [info.start_time, *times, info.end_time] == sorted([info.start_time, *times, info.end_time])
    assert stored(root, run_id).data.metrics["a"] == 3.0


def test_a_kill_while_the_database_is_made_leaves_none_that_is_half_made(tmp_path):
    code = (
        "import itertools, os, signal, sys, pathlib\nfrom alembic.ddl.impl import DefaultImpl\n"
        "from pipeline.tracking import store\nmake, count = DefaultImpl.create_table, itertools.count()\n"
        "def killed(*given, **more):\n    make(*given, **more)\n    next(count) < 3 or os.kill(os.getpid(), signal.SIGKILL)\n"
        "DefaultImpl.create_table = killed\nstore.connect(pathlib.Path(sys.argv[1]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=REPOSITORY)
    assert done.returncode == -signal.SIGKILL
    assert [experiment.name for experiment in store.connect(tmp_path).search_experiments()] == ["Default"]
    assert {path.name for path in (tmp_path / ".mlflow").iterdir()} <= {
        "mlflow.db",
        "mlflow.lock",
        "mlflow.db-wal",
        "mlflow.db-shm",
    }


def test_a_locked_database_keeps_no_run_waiting(root, begin, monkeypatch, capsys):
    monkeypatch.setattr(run_module, "END_SECONDS", 0.5)
    code = "import sqlite3, sys; d = sqlite3.connect(sys.argv[1]); d.execute('BEGIN EXCLUSIVE'); print(); input(); d.rollback()"
    with begin() as run:
        until(lambda: run._sender.run_id)
        locker = subprocess.Popen(
            [sys.executable, "-c", code, str(root / ".mlflow/mlflow.db")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        locker.stdout.readline()
        for step in range(500):
            run.log({"a": step}, step)
    assert locker.poll() is None
    assert "is kept in" in capsys.readouterr().err
    locker.communicate(b"\n")
    until(lambda: not _spool(root))  # by the thread, as long as the process lives
    assert steps(store.connect(root), run.id, "a") == list(range(500))
    assert stored(root, run.id).info.status == "FINISHED"


def test_a_database_that_cannot_be_written_costs_a_warning(root, begin, monkeypatch, capsys):
    with monkeypatch.context() as away:
        # MLflow makes the folder of the address, taken for a path.
        away.chdir(root)
        away.setenv("MLFLOW_TRACKING_URI", f"sqlite:///file:{root}/.mlflow/mlflow.db?mode=ro&uri=true")
        with begin() as run:
            run.log({"a": 1.0}, 1)
    printed = capsys.readouterr().err
    assert printed.count("cannot record") == 1
    assert "readonly" in printed
    assert len(printed.splitlines()) == 2
    tracking.sync(root)
    assert [one.data.tags["vqmoe.offline_id"] for one in runs(store.connect(root))] == [run.id]


@pytest.mark.parametrize("removed", ["database", "folder"])
def test_a_store_that_is_deleted_mid_run_is_made_anew_and_gets_everything(root, begin, removed):
    with begin() as run:
        for step in range(1, 11):
            run.log({"a": step}, step)
        first = run.id
        until(lambda: steps(store.connect(root), first, "a") == list(range(1, 11)))
        if removed == "folder":
            shutil.rmtree(root / ".mlflow")
        else:
            for path in (root / ".mlflow").glob("mlflow.db*"):
                path.unlink()
        for step in range(11, 21):
            run.log({"a": step}, step)
    assert run.id != first
    assert steps(store.connect(root), run.id, "a") == list(range(1, 21))
    assert [one.info.status for one in runs(store.connect(root))] == ["FINISHED"]
    assert _spool(root) == []


def test_files_that_were_removed_from_the_spool_cost_themselves(root, begin, monkeypatch, capsys):
    run = _offline(begin, monkeypatch, lambda run: fill(run, root / "model"))
    shutil.rmtree(root / f".mlflow/spool/{run.id}.files")
    tracking.sync(root)
    (found,) = runs(store.connect(root))
    assert found.info.status == "FINISHED"
    assert "removed before it was sent" in capsys.readouterr().err
    assert os.listdir(root / ".mlflow/spool") == []


def test_a_file_of_which_nothing_can_be_read_is_named_and_left(root, begin, capsys):
    folder = root / ".mlflow/spool"
    folder.mkdir(parents=True, exist_ok=True)
    contents = {"bin": b"\xff\0\n", "cut": b'{"op": "crea', "deep": b"[" * 100_000, "pretrain": b"\0\0"}
    for name, content in contents.items():
        (folder / f"{name}.jsonl").write_bytes(content)
    with pytest.raises(Failure, match="runs sent: 0, not sent: 4"):
        tracking.sync(root)
    lines = capsys.readouterr().err.splitlines()
    for name, line in zip(contents, lines, strict=True):
        assert f"/{name}.jsonl: cannot be sent (none of its lines can be read); mend what it names, or remove it" in line
    assert {path.stem: path.read_bytes() for path in folder.iterdir()} == contents
    # Nor does a run of that name write behind it.
    with begin():
        pass
    assert sorted(path.read_bytes() for path in folder.iterdir()) == sorted(contents.values())
