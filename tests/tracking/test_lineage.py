import subprocess

from pipeline.tracking import lineage


def _git(root, *arguments):
    subprocess.run(["git", "-c", "user.name=t", "-c", "user.email=t@t", *arguments], cwd=root, check=True, capture_output=True)


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
