import subprocess

import pytest

from benchmarks import kills
from pipeline.files import write_json
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


def test_metrics_are_of_all_results_but_ids_times_and_memory(tmp_path):
    prepared = {"run_id": "a", "metrics": {"documents": {"train": 3}}}
    computed = {"run_id": "b", "metrics": {"train": {"both": {"low": 1.5, "flops_per_token": 9, "peak_memory_mib": 2.5}}}}
    for name, result in (("prepare", prepared), ("compute/smoe", computed), ("finetune/smoe-s0/era", {"run_id": "c", "x": 1})):
        write_json(tmp_path / f"results/{name}.json", result)
    assert kills.metrics(tmp_path) == {
        "results/prepare.json/metrics/documents/train": 3,
        "results/compute/smoe.json/metrics/train/both/flops_per_token": 9,
        "results/finetune/smoe-s0/era.json/x": 1,
    }


def test_what_one_of_two_lacks_differs():
    assert kills.differing({"a": 1, "b": None, "c": 3, "d": 4}, {"a": 1, "c": 4, "d": 4, "e": 5}) == ["b", "c", "e"]
