import json
import shutil
import sqlite3

import pytest
from click.testing import CliRunner

import cli
from stages import doctor
from tests.conftest import REPOSITORY


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with the files that commands look for, outside of any repository."""
    for name in ("params.yaml", "dvc.yaml"):
        shutil.copy(REPOSITORY / name, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(doctor, "_dvc", lambda root: doctor.Finding("dvc stages", "up to date"))
    return tmp_path


def examined(*arguments):
    done = CliRunner().invoke(cli.main, ["doctor", *arguments])
    return done.exit_code, done.output


def problems(*names):
    code, output = examined("--json")
    found = {finding["name"]: finding["problem"] for finding in json.loads(output)}
    assert code == any(found.values())
    return [found[name] for name in names]


def test_it_tells_versions_machine_and_state(place):
    code, output = examined()
    assert code == 1  # no commit here
    for name in (
        "vqmoe",
        "torch",
        "mlflow",
        "dvc",
        "python",
        "cpu",
        "memory",
        "gpu",
        "params.yaml",
        "git",
        "mlflow store",
        "disk",
    ):
        assert any(line.startswith(f"{name}  ") for line in output.splitlines()), name
    assert "! no commit here" in output
    assert "vqmoe, smoe; seeds 0; on cpu" in output


def test_what_would_stop_a_run_is_named(place, monkeypatch):
    assert problems("params.yaml", "mlflow store", "disk") == ["", "", ""]
    (place / "params.yaml").write_text((place / "params.yaml").read_text().replace("  layers: 3", "  layers: none"))
    monkeypatch.setattr(doctor, "ROOM", 2**60)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:secret@127.0.0.1:9")
    params, store, disk = problems("params.yaml", "mlflow store", "disk")
    assert "model.layers" in params
    assert "cannot be reached" in store and "secret" not in store
    assert str(place) in disk


def test_runs_that_wait_to_be_sent_are_counted(place):
    spool = place / ".mlflow/spool"
    spool.mkdir(parents=True)
    (spool / "a.jsonl").write_text("")
    assert problems("mlflow store") == ["1 runs are not sent yet; `vqmoe track sync` sends them"]


def test_a_damaged_database_is_named(place):
    (place / ".mlflow").mkdir()
    (place / ".mlflow/mlflow.db").write_bytes(b"no database" * 100)
    with pytest.raises(sqlite3.DatabaseError):
        sqlite3.connect(place / ".mlflow/mlflow.db").execute("SELECT * FROM runs")
    (problem,) = problems("mlflow store")
    assert "cannot be reached" in problem


def test_dvc_says_whether_stages_have_changed(tmp_path):
    assert "no dvc.yaml" in doctor._dvc(tmp_path).problem
    (tmp_path / "dvc.yaml").write_text("stages: {}")
    assert "`dvc status` fails" in doctor._dvc(tmp_path).problem  # not initialised
    assert doctor._dvc(REPOSITORY).value in ("up to date", "changed since the last `dvc repro`")
