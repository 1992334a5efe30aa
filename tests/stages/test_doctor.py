import json
import shutil
import sqlite3
import subprocess

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
    shutil.copytree(REPOSITORY / "data", tmp_path / "data", ignore=shutil.ignore_patterns("archives"))
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


def change(place, before, after):
    text = (place / "params.yaml").read_text()
    assert before in text
    (place / "params.yaml").write_text(text.replace(before, after))


def test_data_that_is_not_there_is_named_by_its_key(place):
    keys = ("data.corpus", "data.tasks", "data.shifts")
    assert problems(*keys) == ["", "", ""]
    (place / "data/kinds.csv").touch()
    change(place, "corpus: sotu", "corpus: enwik")
    change(place, "    era: era ", "    era: imdb\n    mine: data/kinds.csv\n    kinds: data/kinds.cvs")
    change(place, "    austen: austen ", "    austen: austen\n    old: none.txt")
    (place / "data/austen.txt.xz").unlink()
    corpus, tasks, shifts = problems(*keys)
    assert "'enwik': neither a corpus by name" in corpus and "(did you mean enwik8?)" in corpus
    assert tasks.startswith("data.tasks has 'data/kinds.cvs': neither era") and tasks.endswith("(did you mean data/kinds.csv?)")
    assert "austen.txt.xz: not found; restore it with `git checkout data/austen.txt.xz`; data.shifts has 'none.txt'" in shifts


def test_images_that_are_not_there_are_named(place):
    shutil.copy(REPOSITORY / "presets/vision/digits.yaml", place / "params.yaml")
    assert problems("data.corpus", "data.tasks") == ["", ""]
    change(place, "corpus: digits", "corpus: digit")
    change(place, "tasks:", "tasks:\n    nets: imagenet")
    corpus, tasks = problems("data.corpus", "data.tasks")
    assert "'digit': neither images by name" in corpus and "(did you mean digits?)" in corpus
    assert tasks.startswith("imagenet: put train/<class>/")


def test_runs_that_wait_to_be_sent_are_counted_and_stop_nothing(place):
    spool = place / ".mlflow/spool"
    spool.mkdir(parents=True)
    (spool / "a.jsonl").write_text("")
    assert problems("mlflow store") == [""]
    assert "; runs unsent or unfinished: 1 (the next run or `vqmoe track sync` sends them)" in examined()[1]


def test_a_damaged_database_is_named(place):
    (place / ".mlflow").mkdir()
    (place / ".mlflow/mlflow.db").write_bytes(b"no database" * 100)
    with pytest.raises(sqlite3.DatabaseError):
        sqlite3.connect(place / ".mlflow/mlflow.db").execute("SELECT * FROM runs")
    (problem,) = problems("mlflow store")
    assert "cannot be reached" in problem


def test_dvc_says_whether_stages_have_changed(tmp_path, monkeypatch):
    assert "no dvc.yaml" in doctor._dvc(tmp_path).problem
    (tmp_path / "dvc.yaml").write_text("stages: {}")
    problem = doctor._dvc(tmp_path).problem  # not initialised
    assert problem.startswith("`dvc status` fails: you are not inside of a DVC repository")
    for command in (["git", "init", "-q"], ["dvc", "init", "-q"]):
        subprocess.run(command, cwd=tmp_path, check=True)
    assert doctor._dvc(tmp_path).value == "up to date"
    (tmp_path / "dvc.yaml").write_text("stages: {a: {cmd: touch b, outs: [b]}}")
    assert doctor._dvc(tmp_path).value == "changed since the last `dvc repro`"
    (tmp_path / "dvc.yaml").write_text("stages: {a: {}}")
    assert doctor._dvc(tmp_path).problem == "`dvc status` fails: './dvc.yaml' validation failed."
    assert doctor._dvc(REPOSITORY).value in ("up to date", "changed since the last `dvc repro`")
    said = "ERROR: failed to do it: no room\n\nHaving any troubles? Hit us up at https://dvc.org/support\n"
    monkeypatch.setattr(doctor.subprocess, "run", lambda *_, **__: subprocess.CompletedProcess("dvc", 255, "", said))
    assert doctor._dvc(tmp_path).problem == "`dvc status` fails: failed to do it: no room"


def test_nothing_is_made_where_it_looks(place):
    before = sorted(place.iterdir())
    examined()
    assert sorted(place.iterdir()) == before


def test_a_repository_that_cannot_be_written_is_named(place, monkeypatch):
    monkeypatch.setattr(doctor.os, "access", lambda path, mode: path != place)
    disk, temporary = problems("disk", "temporary files")
    assert disk == f"{place} cannot be written, where runs keep what they make; mend its permissions, or use a copy"
    assert temporary == ""
