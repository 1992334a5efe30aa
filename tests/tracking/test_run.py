import hashlib
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from pipeline import tracking
from pipeline.tracking import run as run_module
from pipeline.tracking import store
from tests.conftest import REPOSITORY


@pytest.fixture
def begin(tmp_path):
    return lambda **more: tracking.start(
        tmp_path, experiment="t", stage="pretrain", name="vqmoe-s0", params={"model.width": 8, "seed": 0}, **more
    )


def stored(root, run_id):
    return store.connect(root).get_run(run_id)


def test_a_run_holds_params_metrics_lineage_and_is_finished(tmp_path, begin):
    data = tmp_path / "train.npy"
    data.write_bytes(b"tokens")
    with begin(inputs=[data]) as run:
        for step in range(1, 2501):
            run.log({"train/bpc": 1 / step}, step)
        run.upstream({"prepare": "abc"})
        run.dataset("sotu", data, "training", {"tokens": 6})
        run.outputs([data])
    found = stored(tmp_path, run.id)
    assert found.info.status == "FINISHED"
    assert found.info.run_name == "vqmoe-s0"
    assert found.data.params == {"model.width": "8", "seed": "0"}
    history = store.connect(tmp_path).get_metric_history(run.id, "train/bpc")
    assert [point.step for point in history] == list(range(1, 2501))
    md5 = hashlib.md5(b"tokens").hexdigest()
    tags = found.data.tags
    assert (tags["md5.in.train.npy"], tags["md5.out.train.npy"]) == (md5, md5)
    assert tags["vqmoe.upstream.prepare"] == "abc"
    assert len(tags["vqmoe.params_fingerprint"]) == 64
    assert tags["vqmoe.version.torch"]
    (given,) = found.inputs.dataset_inputs
    assert (given.dataset.name, json.loads(given.dataset.profile)) == ("sotu", {"tokens": 6})
    assert given.dataset.digest == hashlib.sha256(b"tokens").hexdigest()[:32]


def test_points_go_out_in_batches(begin, monkeypatch):
    sizes = []
    original = run_module.Run._log_batch
    monkeypatch.setattr(run_module.Run, "_log_batch", lambda self, points: (sizes.append(len(points)), original(self, points)))
    monkeypatch.setattr(run_module, "FLUSH_SECONDS", 1e9)
    with begin() as run:
        for step in range(2500):
            run.log({"a": 1.0}, step)
    assert sizes == [1000, 1000, 500]


def test_the_model_is_a_logged_model_without_pickles(tmp_path, begin):
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("model.safetensors", "model.json"):
        (folder / name).write_text(name)
    with begin() as run:
        run.model(folder, "pretrain-vqmoe-s0", {"test/bpc": 1.5})
    client = store.connect(tmp_path)
    (model,) = client.search_logged_models([stored(tmp_path, run.id).info.experiment_id])
    assert (model.name, str(model.status), model.source_run_id) == ("pretrain-vqmoe-s0", "READY", run.id)
    assert {(metric.key, metric.value) for metric in model.metrics} == {("test/bpc", 1.5)}
    files = {path.name for path in (tmp_path / ".mlflow/artifacts").rglob("*") if path.is_file()}
    assert {"model.safetensors", "model.json"} <= files
    assert not [name for name in files if name.endswith((".pkl", ".pth", ".pickle"))]


@pytest.mark.parametrize(
    ("error", "status"), [(ValueError("no\nluck"), "FAILED"), (KeyboardInterrupt(), "KILLED"), (SystemExit(143), "KILLED")]
)
def test_a_run_that_ends_badly_says_how(tmp_path, begin, error, status):
    with pytest.raises(type(error)), begin() as run:
        run.log({"a": 1.0})
        raise error
    found = stored(tmp_path, run.id)
    assert found.info.status == status
    assert found.data.metrics == {"a": 1.0}
    if status == "FAILED":
        assert "no" in found.data.tags["vqmoe.error"]


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_ends_a_run_as_killed(tmp_path, sent, code):
    script = (
        "import sys, time, pathlib\nfrom pipeline import tracking\n"
        "with tracking.start(pathlib.Path(sys.argv[1]), experiment='t', stage='s', name='n', params={}) as run:\n"
        "    print(run.id, flush=True)\n    time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
    run_id = process.stdout.readline().strip()
    process.send_signal(sent)
    assert process.wait(30) == code
    assert stored(tmp_path, run_id).info.status == "KILLED"


def test_a_store_that_cannot_be_reached_costs_a_warning_and_keeps_the_points(tmp_path, begin, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://someone:secret@127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    started = time.monotonic()
    with begin() as run:
        for step in range(3000):
            run.log({"a": step}, step)
        run.upstream({"prepare": "x"})
        run.artifact(tmp_path)
    assert time.monotonic() - started < 30
    assert run.id.startswith("offline-")
    spooled = [json.loads(line) for line in (tmp_path / ".mlflow/spool" / f"{run.id}.jsonl").read_text().splitlines()]
    assert [point["step"] for point in spooled] == list(range(3000))
    assert set(spooled[0]) == {"run_id", "key", "value", "step", "timestamp"}
    printed = capsys.readouterr().err
    assert printed.count("cannot record") == 1
    assert "secret" not in printed
    assert "127.0.0.1:9" in printed


def test_nohup_outlives_its_terminal(tmp_path):
    script = (
        "import os, pathlib, signal, sys\nfrom pipeline import tracking\n"
        "with tracking.start(pathlib.Path(sys.argv[1]), experiment='t', stage='s', name='n', params={}) as run:\n"
        "    os.kill(os.getpid(), signal.SIGHUP)\n    print(run.id, flush=True)\n"
    )
    done = subprocess.run(
        ["nohup", sys.executable, "-c", script, str(tmp_path)], cwd=REPOSITORY, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert stored(tmp_path, done.stdout.strip()).info.status == "FINISHED"


def test_an_interrupt_while_the_run_is_created_ends_it_too(tmp_path, begin, monkeypatch):
    def interrupted(root):
        raise KeyboardInterrupt

    monkeypatch.setattr(run_module.lineage, "diff", interrupted)
    with pytest.raises(KeyboardInterrupt), begin():
        pytest.fail("the body was reached")
    client = store.connect(tmp_path)
    (run,) = client.search_runs([client.get_experiment_by_name("t/pretrain").experiment_id])
    assert run.info.status == "KILLED"


def test_a_folder_that_cannot_be_written_costs_the_records_not_the_run(tmp_path, begin, capsys):
    (tmp_path / ".mlflow").write_text("")
    with begin() as run:
        run.log({"a": 1.0})
        run.flush()
        run.log({"a": 2.0})
    printed = capsys.readouterr().err
    assert "cannot record" in printed
    assert printed.count("metrics of this run are lost") == 1


def test_four_processes_start_on_an_empty_database_at_once(tmp_path):
    script = (
        "import sys, pathlib\nfrom pipeline import tracking\n"
        "with tracking.start(pathlib.Path(sys.argv[1]), experiment='t', stage='s', name=sys.argv[2], params={}) as run:\n"
        "    run.log({'a': 1.0})\n"
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", script, str(tmp_path), str(i)], cwd=REPOSITORY, stderr=subprocess.PIPE, text=True)
        for i in range(4)
    ]
    problems = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * 4
    assert not [text for text in problems if "cannot record" in text]
    client = store.connect(tmp_path)
    (found,) = client.search_experiments(filter_string="name = 't/s'")
    runs = client.search_runs([found.experiment_id])
    assert sorted(run.info.run_name for run in runs) == ["0", "1", "2", "3"]
    assert {run.info.status for run in runs} == {"FINISHED"}


def test_importing_does_not_load_mlflow():
    code = "import pipeline.tracking, sys; sys.exit('mlflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY).returncode == 0


def test_a_run_id_in_the_environment_is_not_taken_over(tmp_path, begin, monkeypatch):
    with begin() as first:
        pass
    monkeypatch.setenv("MLFLOW_RUN_ID", first.id)
    with begin() as second:
        second.log({"a": 1.0})
    assert second.id != first.id
    assert stored(tmp_path, first.id).data.metrics == {}


def test_where_runs_go(tmp_path, monkeypatch):
    assert store.tracking_uri(tmp_path) == f"sqlite:///{tmp_path}/.mlflow/mlflow.db"
    monkeypatch.setenv("DVC_ROOT", str(tmp_path / "real"))
    assert store.tracking_uri(tmp_path) == f"sqlite:///{tmp_path}/real/.mlflow/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://localhost:1")
    assert store.tracking_uri(tmp_path) == "http://localhost:1"
    assert os.environ["MLFLOW_TRACKING_URI"] == "http://localhost:1"
