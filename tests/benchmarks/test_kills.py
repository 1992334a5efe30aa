import subprocess

import pytest

from benchmarks import kills
from tests.conftest import REPOSITORY


@pytest.fixture
def reproduced(tmp_path):
    """A repository of one stage, which dvc has run."""
    (tmp_path / "dvc.yaml").write_text("stages: {a: {cmd: echo a > a.txt, outs: [a.txt]}}")
    for command in ("git init -q", "dvc init -q"):
        subprocess.run(command.split(), cwd=tmp_path, check=True)
    assert kills.finish(tmp_path) == []
    subprocess.run(["git", "add", "dvc.lock"], cwd=tmp_path, check=True)
    return tmp_path


def test_torn_files_of_dvc_are_put_right_as_documented(reproduced):
    for file, left in ((".dvc/tmp/rwlock", 0), ("dvc.lock", 0), ("dvc.lock", 20)):
        (reproduced / file).write_text((reproduced / file).read_text()[:left])
        (typed,) = kills.finish(reproduced)
        assert f"`{typed}`" in (REPOSITORY / "docs/RELIABILITY.md").read_text()
        assert file in typed


def test_what_is_not_torn_is_no_such_case(reproduced):
    (reproduced / "dvc.yaml").write_text("stages: {a: {cmd: exit 3}}")
    with pytest.raises(SystemExit, match="dvc repro ended by itself:"):
        kills.finish(reproduced)
