import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time

import pytest

from pipeline import tracking
from pipeline.errors import Failure
from pipeline.files import digest
from pipeline.tracking import run as run_module
from pipeline.tracking import store
from tests.conftest import REPOSITORY
from tests.tracking.conftest import DEAD, steps, stored


def test_a_run_holds_params_metrics_lineage_and_is_finished(root, begin):
    data = root / "train.npy"
    data.write_bytes(b"tokens")
    params = {"model.width": 8, "seed": 0, "method": "vqmoe"}
    with begin(inputs=[data], params=params) as run:
        for step in range(1, 2501):
            run.log({"train/bpc": 1 / step}, step)
        run.upstream({"prepare": "abc"})
        run.dataset("sotu", data, "training", {"tokens": 6})
        run.outputs([data])
    found = stored(root, run.id)
    assert found.info.status == "FINISHED"
    assert found.info.run_name == "vqmoe-s0"
    assert found.data.params == {"model.width": "8", "seed": "0", "method": "vqmoe"}
    history = store.connect(root).get_metric_history(run.id, "train/bpc")
    assert [point.step for point in history] == list(range(1, 2501))
    md5 = hashlib.md5(b"tokens").hexdigest()
    tags = found.data.tags
    assert (tags["md5.in.train.npy"], tags["md5.out.train.npy"]) == (md5, md5)
    assert (tags["vqmoe.upstream.prepare"], tags["method"]) == ("abc", "vqmoe")
    assert len(tags["vqmoe.params_fingerprint"]) == 64
    assert tags["vqmoe.version.torch"]
    (given,) = found.inputs.dataset_inputs
    assert (given.dataset.name, json.loads(given.dataset.profile)) == ("sotu", {"tokens": 6})
    assert given.dataset.digest == hashlib.sha256(b"tokens").hexdigest()[:32]


def test_points_go_out_in_batches(begin, monkeypatch):
    sizes = []
    original = store.Sender._log
    monkeypatch.setattr(store.Sender, "_log", lambda self, points: (sizes.append(len(points)), original(self, points)))
    with begin() as run:
        for step in range(2500):
            run.log({"a": 1.0}, step)
    assert sum(sizes) == 2500
    assert max(sizes) <= 1000
    assert len(sizes) < 10


def test_the_model_is_a_logged_model_without_pickles(root, begin):
    folder = root / "model"
    folder.mkdir()
    for name in ("model.safetensors", "model.json"):
        (folder / name).write_text(name)
    with begin() as run:
        for name, context in (("model.json", "training"), ("model.safetensors", "test")):
            run.dataset("sotu", folder / name, context, {})
        for step, score in ((4, 3.0), (8, 2.0), (12, 2.5)):
            run.log({"valid/bpc": score}, step)
        run.model(folder, "pretrain-vqmoe-s0", {"test/bpc": 1.5, "valid/bpc": 2.0}, step=8)
    client = store.connect(root)
    (model,) = client.search_logged_models([stored(root, run.id).info.experiment_id])
    assert (model.name, str(model.status), model.source_run_id) == ("pretrain-vqmoe-s0", "READY", run.id)
    assert model.params == stored(root, run.id).data.params
    # A score is that of the test data.
    test = digest(folder / "model.safetensors")[:32]
    found = {(metric.key, metric.value, metric.step, metric.dataset_name, metric.dataset_digest) for metric in model.metrics}
    assert found == {("test/bpc", 1.5, 0, "sotu", test), ("valid/bpc", 2.0, 8, None, None)}
    # The point of the curve, and no other.
    assert steps(client, run.id, "valid/bpc") == [4, 8, 12]
    files = {path.name for path in (root / ".mlflow/artifacts").rglob("*") if path.is_file()}
    assert {"model.safetensors", "model.json"} <= files
    assert not [name for name in files if name.endswith((".pkl", ".pth", ".pickle"))]


@pytest.mark.parametrize(
    ("error", "status"), [(ValueError("no\nluck"), "FAILED"), (KeyboardInterrupt(), "KILLED"), (SystemExit(143), "KILLED")]
)
def test_a_run_that_ends_badly_says_how(root, begin, error, status):
    with pytest.raises(type(error)), begin() as run:
        run.log({"a": 1.0})
        raise error
    found = stored(root, run.id)
    assert found.info.status == status
    assert found.data.metrics == {"a": 1.0}
    if status == "FAILED":
        assert "no" in found.data.tags["vqmoe.error"]


@pytest.mark.parametrize(("sent", "stop"), [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)])
def test_a_signal_waits_until_an_import_is_out_of_the_system_that_locks_it(sent, stop, monkeypatch):
    met = []

    class Finder:
        def find_spec(self, name, path=None, target=None):
            frame = sys._getframe().f_back
            met.append(frame.f_code.co_filename)
            signal.getsignal(sent)(sent, frame)

    monkeypatch.setattr(sys, "meta_path", [Finder(), *sys.meta_path])
    with pytest.raises(stop), tracking.terminable():
        with pytest.raises(ImportError):
            import nothing_of_that_name  # noqa: F401
        met.append("out of it")
        time.sleep(10)
    assert met == ["<frozen importlib._bootstrap>", "out of it"]


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_ends_a_run_as_killed(root, sent, code):
    script = (
        "import sys, time, pathlib\nfrom pipeline import tracking\n"
        "with tracking.start(pathlib.Path(sys.argv[1]), key='k', resumed=False, experiment='t',\n"
        "        stage='s', name='n', params={}) as run:\n"
        "    print(run.id, flush=True)\n    time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(root)], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
    run_id = process.stdout.readline().strip()
    process.send_signal(sent)
    assert process.wait(30) == code
    assert stored(root, run_id).info.status == "KILLED"


def test_a_store_that_cannot_be_reached_costs_a_warning_and_keeps_everything(root, begin, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", DEAD)
    with begin() as run:
        for step in range(3000):
            run.log({"a": step}, step)
        run.upstream({"prepare": "x"})
        run.artifact(root / ".mlflow/mlflow.db")
    assert run.id.startswith("offline-")
    lines = [json.loads(line) for line in (root / ".mlflow/spool/pretrain.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["op"] == "log"] == list(range(3000))
    assert [line["op"] for line in lines if line["op"] != "log"] == ["create", "tags", "artifact", "end"]
    printed = capsys.readouterr().err
    assert printed.count("cannot record") == 1
    assert DEAD in printed
    assert f"run {run.id} is kept in {root}/.mlflow/spool/pretrain.jsonl; `vqmoe track sync` sends it" in printed
    assert len(printed.splitlines()) == 2


def test_nohup_outlives_its_terminal(root):
    script = (
        "import os, pathlib, signal, sys\nfrom pipeline import tracking\n"
        "with tracking.start(pathlib.Path(sys.argv[1]), key='k', resumed=False, experiment='t',\n"
        "        stage='s', name='n', params={}) as run:\n"
        "    os.kill(os.getpid(), signal.SIGHUP)\n    print(run.id, flush=True)\n"
    )
    done = subprocess.run(
        ["nohup", sys.executable, "-c", script, str(root)], cwd=REPOSITORY, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert stored(root, done.stdout.strip()).info.status == "FINISHED"


def test_an_interrupt_before_the_run_is_there_leaves_nothing(root, begin, monkeypatch):
    def interrupted(root):
        raise KeyboardInterrupt

    monkeypatch.setattr(run_module.lineage, "diff", interrupted)
    with pytest.raises(KeyboardInterrupt), begin():
        pytest.fail("the body was reached")
    assert not (root / ".mlflow/spool").exists()


def test_a_folder_that_cannot_be_written_costs_its_records_a_place_elsewhere(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / ".mlflow").write_text("")
    with tracking.start(tmp_path, key="k", resumed=False, experiment="t", stage="s", name="n", params={}) as run:
        run.log({"a": 1.0}, 1)
    (journal,) = tmp_path.glob("vqmoe-spool-*/k.jsonl")
    assert '"step": 1' in journal.read_text()
    printed = capsys.readouterr().err
    assert f"{tmp_path}/.mlflow/spool: cannot be used" in printed
    assert f"kept in {journal}; `vqmoe track sync` sends it, once" in printed


def test_a_full_disk_costs_records_not_the_run(root, begin, monkeypatch, capsys):
    with begin() as run:
        run.log({"a": 1.0}, 1)

        def full(operation):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(run._journal, "append", full)
        run.log({"a": 2.0}, 2)
        run.log({"a": 3.0}, 3)
    printed = capsys.readouterr().err
    assert printed.count("what it lacks of this run is lost") == 1


def test_eight_processes_start_on_an_empty_database_at_once(tmp_path):
    command = [sys.executable, "-m", "tests.tracking.at_once", str(tmp_path), "t", "1"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    # A machine that is too slow for END_SECONDS leaves journals, which are sent afterwards.
    assert done.returncode == 0 and "cannot record" not in done.stderr, done.stderr
    tracking.sync(tmp_path)
    client = store.connect(tmp_path)
    (found,) = client.search_experiments(filter_string="name = 't/s'")
    runs = client.search_runs([found.experiment_id])
    assert sorted(run.info.run_name for run in runs) == [str(i) for i in range(8)]
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert {run.data.metrics["train/loss"] for run in runs} == {1.0}


def test_importing_does_not_load_mlflow():
    code = "import pipeline.tracking, sys; sys.exit('mlflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY).returncode == 0


def test_a_run_id_in_the_environment_is_not_taken_over(root, begin, monkeypatch):
    with begin() as first:
        pass
    monkeypatch.setenv("MLFLOW_RUN_ID", first.id)
    with begin() as second:
        second.log({"a": 1.0})
    assert second.id != first.id
    assert stored(root, first.id).data.metrics == {}


def test_where_runs_go(tmp_path, monkeypatch):
    assert store.tracking_uri(tmp_path) == f"sqlite:///{tmp_path}/.mlflow/mlflow.db"
    monkeypatch.setenv("DVC_ROOT", str(tmp_path / "real"))
    assert store.tracking_uri(tmp_path) == f"sqlite:///{tmp_path}/real/.mlflow/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://localhost:1")
    assert store.tracking_uri(tmp_path) == "http://localhost:1"
    assert os.environ["MLFLOW_TRACKING_URI"] == "http://localhost:1"


@pytest.mark.parametrize(
    ("uri", "shown", "hidden"),
    [
        ("http://u:sec[ret@127.0.0.1:1", "http://127.0.0.1:1", ["sec[", "ret@"]),
        ("http://u:sec/ret@127.0.0.1:1", "http://127.0.0.1:1", ["sec/", "'sec'", "ret@"]),
        ("http://u:secret\u2100@127.0.0.1:1", "http://127.0.0.1:1", ["secret"]),
        ("http://[::1", "http://[::1", []),
    ],
)
def test_an_address_that_is_no_url_costs_a_warning_and_shows_no_password(root, begin, monkeypatch, capsys, uri, shown, hidden):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with begin() as run:
        run.log({"a": 1.0}, 1)
    said = [capsys.readouterr().err]
    assert f"cannot record to {shown} (it is no URL: its port has to be digits" in said[0]
    for call in (tracking.sync, lambda root: tracking.find(root, "1234"), lambda root: tracking.serve(root, 1, "vqmoe")):
        with pytest.raises(Failure) as refused:
            call(root)
        said.append(str(refused.value))
        assert said[-1].startswith(f"{shown}: ") and "it is no URL: " in said[-1]
    said += map(str, tracking.reach(root))
    assert not [line for line in said if any(part in line for part in hidden)]


def test_what_a_parser_takes_for_the_path_is_part_of_a_password(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://u:12/heim@127.0.0.1:1")
    said = store.without_credentials("http://u:12/heim@127.0.0.1:1: HTTPConnectionPool(host='u', port=12): /heim@127.0.0.1:1/api")
    assert said == "http://127.0.0.1:1: HTTPConnectionPool(host='u', port=12): /127.0.0.1:1/api"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:////home/a@b/mlflow.db")
    assert store.without_credentials("sqlite:////home/a@b/mlflow.db") == "sqlite:////home/a@b/mlflow.db"
