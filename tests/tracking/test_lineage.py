import os
import subprocess

import pytest
import torch

from pipeline.errors import Failure
from pipeline.tracking import lineage


def _git(root, *arguments, **more):
    command = ["git", "-c", "user.name=t", "-c", "user.email=t@t", *arguments]
    return subprocess.run(command, cwd=root, check=True, capture_output=True, **more).stdout


@pytest.fixture
def repository(tmp_path):
    """A repository with a file, a folder of results and an ignored file, all committed or ignored."""
    root = tmp_path / "repository"
    root.mkdir()
    _git(root, "init")
    (root / ".gitignore").write_text("*.tmp\n")
    (root / "a.txt").write_bytes(b"one\r\ntwo\r\n")
    _git(root, "add", ".")
    _git(root, "commit", "-m", "first")
    (root / "ignored.tmp").write_text("x")
    return root


def _applied(root):
    """The repository's files, were its commit checked out elsewhere and the diff applied."""
    other = root.parent / "other"
    _git(root, "clone", str(root), str(other))
    _git(other, "apply", "-", input=lineage.diff(root).encode())
    return {path.name: path.read_bytes() for path in other.rglob("*") if path.is_file() and ".git" not in path.parts}


def test_the_diff_makes_the_same_files_whatever_they_hold_and_leaves_the_index_alone(repository):
    (repository / "a.txt").write_bytes(b"one\r\nmore\r\n")
    (repository / "new file.py").write_bytes(b"x = '\xc3\xa9'\n")
    (repository / "b*.bin").write_bytes(bytes(range(256)))
    (repository / "empty.py").touch()
    _git(repository, "config", "diff.noprefix", "true")
    _git(repository, "config", "color.ui", "always")
    before = _git(repository, "status", "--porcelain")
    files = {path.name: path.read_bytes() for path in repository.iterdir() if path.is_file() and path.suffix != ".tmp"}
    assert _applied(repository) == files
    assert _git(repository, "status", "--porcelain") == before


def test_a_change_in_the_second_of_the_commit_is_seen(repository):
    _git(repository, "config", "core.trustctime", "false")
    file, index = repository / "a.txt", repository / ".git/index"
    file.write_text("1\n")
    os.utime(file, (1e9, 1e9))
    _git(repository, "commit", "--all", "-m", "second")
    os.utime(index, (1e9, 1e9))
    file.write_text("2\n")
    os.utime(file, (1e9, 1e9))
    assert "\n-1\n" in lineage.diff(repository)


def test_data_and_what_stages_write_are_no_changes_of_the_source(repository):
    for name in ("results/a.json", "report/report.md", "data/mine.txt", "dvc.lock"):
        (repository / name).parent.mkdir(exist_ok=True)
        (repository / name).write_text("x")
    assert lineage.diff(repository) == ""
    assert lineage.source_tags(repository)["vqmoe.git_dirty"] == "false"
    (repository / "pipeline/data").mkdir(parents=True)
    (repository / "pipeline/data/new.py").write_text("x")
    assert "pipeline/data/new.py" in lineage.diff(repository)
    assert lineage.source_tags(repository)["vqmoe.git_dirty"] == "true"


def test_new_files_without_room_are_named_and_a_cut_is_marked(repository, monkeypatch):
    monkeypatch.setattr(lineage, "DIFF_LIMIT", 1000)
    (repository / "large.bin").write_bytes(b"x" * 1001)
    (repository / "small.py").write_text("x = 1\n")
    changes = lineage.diff(repository)
    assert changes.splitlines()[0] == f"{lineage.LEFT_OUT}large.bin"
    assert "+x = 1" in changes
    assert set(_applied(repository)) == {".gitignore", "a.txt", "small.py"}
    (repository / "a.txt").write_text("y" * 1001)
    changes = lineage.diff(repository)
    assert changes.endswith(lineage.CUT)
    assert len(changes) < 1200


def test_the_machine_is_named(tmp_path):
    tags = lineage.source_tags(tmp_path)
    assert tags["vqmoe.threads"] == str(torch.get_num_threads())
    assert tags["vqmoe.cpu"]
    assert tags["vqmoe.gpu"]


def test_commit_and_changes_are_named(tmp_path):
    assert lineage.git(tmp_path / "nowhere", "status") == ""
    assert "mlflow.source.git.commit" not in lineage.source_tags(tmp_path)
    _git(tmp_path, "init")
    (tmp_path / "a.txt").write_text("one\n")
    _git(tmp_path, "add", ".")
    _git(tmp_path, "commit", "-m", "first")
    tags = lineage.source_tags(tmp_path)
    assert len(tags["mlflow.source.git.commit"]) == 40
    assert tags["vqmoe.git_dirty"] == "false"
    assert lineage.diff(tmp_path) == ""
    (tmp_path / "results").mkdir()
    (tmp_path / "results/pretrain.json").write_text("{}")  # what stages write is no change of the source
    assert lineage.source_tags(tmp_path)["vqmoe.git_dirty"] == "false"
    (tmp_path / "a.txt").write_text("two\n")
    assert lineage.source_tags(tmp_path)["vqmoe.git_dirty"] == "true"
    assert "+two" in lineage.diff(tmp_path)


def test_dvc_stage_and_folder_digests(tmp_path, monkeypatch):
    monkeypatch.setenv("DVC_STAGE", "pretrain@vqmoe-0")
    assert lineage.source_tags(tmp_path)["dvc.stage"] == "pretrain@vqmoe-0"
    (tmp_path / "d/sub").mkdir(parents=True)
    (tmp_path / "d/sub/f").write_bytes(b"x")
    assert lineage.digests([tmp_path / "d"], tmp_path, "out") == {"md5.out.d/sub/f": "9dd4e461268c8034f5c8564e155c67a6"}


def test_files_of_the_repository_that_an_experiment_was_copied_from_are_named_from_it(tmp_path, monkeypatch):
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    archive, copy = tmp_path / "data/archives/a.zip", tmp_path / ".dvc/tmp/exps/copy"
    for path in (archive, copy / "params.yaml"):
        path.parent.mkdir(parents=True)
        path.touch()
    assert {*lineage.digests([archive, copy / "params.yaml"], copy, "in")} == {"md5.in.data/archives/a.zip", "md5.in.params.yaml"}


def test_a_disk_without_room_for_a_temporary_file_is_one_line(repository, monkeypatch):
    monkeypatch.setattr(lineage.tempfile, "tempdir", str(repository / "gone"))
    with pytest.raises(Failure, match=r"no temporary folder can be made \(.*gone.*\); free space there, or set TMPDIR"):
        lineage.diff(repository)
