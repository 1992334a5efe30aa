"""Runs made again from what they recorded, in a small git repository with the project's own code."""

import json
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

import cli
from pipeline import config, tracking
from pipeline.moe.layer import SETTINGS
from pipeline.tracking import recorded, store
from stages import reproduce
from stages.paths import Cell
from tests.conftest import write_corpus
from tests.stages.repository import git, make


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A repository with code and params committed, data that git does not know, and runs of prepare and pretrain."""
    root = make(tmp_path_factory.mktemp("reproduce") / "repository")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        for arguments in (["prepare"], ["pretrain", "-S", "pretrain.steps=7"]):
            assert CliRunner().invoke(cli.main, arguments).exit_code == 0
    return root


@pytest.fixture
def vqmoe(root, warm, monkeypatch):
    monkeypatch.chdir(root)
    monkeypatch.setattr(sys, "executable", str(warm / "python"))
    return lambda *arguments: CliRunner().invoke(cli.main, arguments)


@pytest.fixture
def no_stage(vqmoe, monkeypatch):
    """Every stage that is to run ends with code 1 at once."""
    monkeypatch.setattr(sys, "executable", "false")


@pytest.fixture
def record(root):
    """A function that records a finished run of prepare that read `inputs`; it returns the run's id."""

    def make(inputs=(), stage="prepare", overrides=()):
        params = config.load(root / "params.yaml", SETTINGS, overrides)
        with tracking.start(
            root, key=stage, resumed=False, experiment="t", stage=stage, name=stage, params={}, inputs=inputs
        ) as run:
            run.text(config.dump(params), "params.yaml")
        return run.id

    return make


def run_id(root, stage, cell=""):
    return json.loads((root / "results" / stage / f"{cell}.json" if cell else root / f"results/{stage}.json").read_text())[
        "run_id"
    ]


def leftovers(root):
    return [path.name for path in root.parent.iterdir() if path.name.startswith(reproduce.FOLDER)]


def assert_one_line(result, code, *parts):
    assert result.exit_code == code, result.output
    (line,) = [line for line in result.output.splitlines() if line.startswith("vqmoe: ")]
    assert "Traceback" not in result.output
    for part in parts:
        assert part in line, line


def test_a_run_with_overrides_comes_out_the_same_and_nothing_else_changes(vqmoe, root):
    client = store.connect(root)

    def runs():
        return {run.info.run_id for one in client.search_experiments() for run in client.search_runs([one.experiment_id])}

    before, state = runs(), git(root, "status", "--porcelain")
    result = vqmoe("reproduce", run_id(root, "pretrain", "vqmoe-s0")[:6])
    assert result.exit_code == 0, result.output
    assert "is reproduced" in result.output
    assert "differs" not in result.output
    for row in ("best_step", "test/bpc", "outputs/pretrain/vqmoe-s0/model.safetensors"):
        assert f"│ {row} " in result.output
    assert "cost/" not in result.output
    assert (runs(), git(root, "status", "--porcelain")) == (before, state)
    assert leftovers(root) == []


def test_of_a_run_of_train_only_what_was_tampered_with_differs(vqmoe, root):
    assert vqmoe("train", "--method", "smoe", "--seed", "3").exit_code == 0
    (made,) = (root / "runs").iterdir()
    tuned, client = run_id(made, "finetune", "smoe-s3/toy"), store.connect(root)
    client.log_metric(tuned, "test/nats", 4 * client.get_run(tuned).data.metrics["test/nats"])
    client.set_tag(tuned, "vqmoe.version.torch", "0.1")
    result = vqmoe("reproduce", tuned)
    assert_one_line(result, 1, f"run {tuned} is not reproduced: 1 of ", " metrics and 0 of 7 files differ")
    rows = {line.split()[1]: line.split() for line in result.output.splitlines() if line.startswith("│ ")}
    assert rows["test/nats"][-2] == "-7.5e-01"
    assert "outputs/finetune/smoe-s3/toy/model.safetensors" in rows
    assert rows["vqmoe.version.torch"][3] == "0.1"
    assert "vqmoe.version.numpy" not in rows


def test_changes_and_new_files_that_were_not_committed_are_part_of_it(vqmoe, root):
    stage = root / "stages/prepare.py"
    committed = stage.read_text()
    stage.write_text(
        committed + "\n\n_run = run\n\n\ndef run(*given):\n    import extra\n    return _run(*given) | extra.METRICS\n"
    )
    (root / "extra.py").write_text("METRICS = {'extra': 5}\r\n")
    command = [sys.executable, "-c", "from cli import main; main()", "prepare"]
    subprocess.run(command, cwd=root, check=True, capture_output=True)
    (root / "extra.py").unlink()
    stage.write_text(committed)
    result = vqmoe("reproduce", run_id(root, "prepare"))
    assert result.exit_code == 0, result.output
    assert "│ extra " in result.output


def test_changed_data_is_named_before_a_stage_runs_and_a_stage_that_fails_is_named(vqmoe, root, record, no_stage):
    corpus = write_corpus(root / "data/changing")
    run = record([corpus], overrides=["data.corpus=data/changing"])
    (corpus / "valid.txt").write_text("other text")
    result = vqmoe("reproduce", run)
    assert f"data/changing/valid.txt is not what run {run} read" in result.output
    assert "changing/train.txt" not in result.output
    assert_one_line(result, 1, f"run {run}: prepare ended with code 1", "--keep")
    assert leftovers(root) == []


def test_data_that_is_gone_is_named(vqmoe, root, record, no_stage):
    corpus = write_corpus(root / "data/short-lived")
    run = record([corpus], overrides=["data.corpus=data/short-lived"])
    (corpus / "valid.txt").unlink()
    assert_one_line(vqmoe("reproduce", run), 1, "data/short-lived/valid.txt: gone", "put it back (its md5 is ")


def test_data_behind_a_link_is_left_alone(vqmoe, root, record, no_stage):
    elsewhere = write_corpus(root.parent / "elsewhere")
    (root / "linked").symlink_to(elsewhere)  # new, and not under data/: part of what the run keeps
    run = record([root / "linked"], overrides=["data.corpus=linked"])
    (elsewhere / "valid.txt").write_text("other text")
    result = vqmoe("reproduce", run)
    (root / "linked").unlink()
    assert "linked/valid.txt is not what run" in result.output
    assert (elsewhere / "valid.txt").read_text() == "other text"


def test_data_that_was_changed_and_not_committed_is_taken_as_it_was_read(vqmoe, root, record, no_stage):
    (root / "data/kept.txt").write_text("committed")
    git(root, "add", "data/kept.txt")
    git(root, "commit", "-m", "data")
    (root / "data/kept.txt").write_text("changed")
    run = record([root / "data/kept.txt"], overrides=["data.corpus=data/kept.txt"])
    result = vqmoe("reproduce", run, "--keep")
    kept = root.parent / f"{reproduce.FOLDER}{run[:8]}"
    text = (kept / "data/kept.txt").read_text()
    shutil.rmtree(kept)
    assert text == "changed"
    assert "is not what" not in result.output


def test_a_kept_work_tree_has_the_params_of_the_run_and_is_not_overwritten(vqmoe, root, record, no_stage):
    run = record(overrides=["pretrain.steps=77"])
    result = vqmoe("reproduce", run, "--keep")
    kept = root.parent / f"{reproduce.FOLDER}{run[:8]}"
    assert f"Work tree: {kept}" in result.output
    assert config.load(kept / "params.yaml", SETTINGS).pretrain.steps == 77
    result = vqmoe("reproduce", run)
    shutil.rmtree(kept)
    assert_one_line(result, 1, f"{kept}: is there already")


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        ("abc", ["'abc' is no run id", "4 to 32"]),
        ("offline-0123", ["is no run id"]),
        ("0123456789abcdef", ["no run has an id that begins with 0123456789abcdef", "vqmoe ui"]),
    ],
)
def test_a_run_that_does_not_exist(vqmoe, given, parts):
    assert_one_line(vqmoe("reproduce", given), 2, *parts)


def test_an_id_that_two_runs_begin_with(vqmoe, monkeypatch):
    monkeypatch.setattr(recorded, "find", lambda root, prefix: [SimpleNamespace(id="abcd1"), SimpleNamespace(id="abcd2")])
    assert_one_line(vqmoe("reproduce", "abcd"), 2, "abcd1 and abcd2 both begin with abcd; give more of the id")


def test_runs_that_there_is_nothing_to_make_again_of(vqmoe, root, record):
    report = record(stage="report")
    assert_one_line(vqmoe("reproduce", report), 2, f"run {report} is a report", "vqmoe.upstream.*")
    failed = record()
    store.connect(root).set_terminated(failed, "FAILED")
    assert_one_line(vqmoe("reproduce", failed), 2, f"run {failed} is FAILED", "nothing to compare with")


def test_a_commit_that_is_missing(vqmoe, root, record, no_stage):
    run = record()
    store.connect(root).set_tag(run, "mlflow.source.git.commit", "0" * 40)
    assert_one_line(vqmoe("reproduce", run), 1, f"run {run}: its commit {'0' * 40} is not in this repository", "git fetch")
    assert leftovers(root) == []
    store.connect(root).delete_tag(run, "mlflow.source.git.commit")
    assert_one_line(vqmoe("reproduce", run), 1, f"run {run}: has no commit")


def test_a_commit_that_no_branch_has_any_more(vqmoe, root, record, no_stage):
    git(root, "commit", "--allow-empty", "-m", "amended later")
    run = record()
    git(root, "reset", "--soft", "HEAD^")
    assert_one_line(vqmoe("reproduce", run), 1, "prepare ended with code 1")


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ("diff --git a/cli.py b/cli.py\n--- a/cli.py\n+++ b/cli.py\n@@ -1 +1 @@\n-none\n+one\n", ["does not apply", "cli.py:1"]),
        (f"diff --git a/cli.py b/cli.py\n--- a{tracking.CUT}", ["more was changed", "commit before such a run"]),
        (None, ["its artifact changes.diff is lost", ".mlflow/artifacts/"]),
    ],
)
def test_changes_that_cannot_be_had(vqmoe, root, record, no_stage, changes, parts):
    run = record()
    store.connect(root).set_tag(run, "vqmoe.git_dirty", "true")
    if changes:
        store.connect(root).log_text(run, changes, "changes.diff")
    assert_one_line(vqmoe("reproduce", run), 1, f"run {run}: ", *parts)
    assert leftovers(root) == []


def test_new_files_that_were_too_large_are_named(vqmoe, root, record, no_stage):
    run = record()
    store.connect(root).set_tag(run, "vqmoe.git_dirty", "true")
    store.connect(root).log_text(run, f"{tracking.LEFT_OUT}big.bin\n", "changes.diff")
    result = vqmoe("reproduce", run)
    assert f"Not kept with run {run} and not here: big.bin" in result.output
    assert_one_line(result, 1, "prepare ended with code 1")


def test_params_that_are_lost(vqmoe, root, record):
    run = record()
    shutil.rmtree(next((root / ".mlflow/artifacts").rglob(run)))
    assert_one_line(vqmoe("reproduce", run), 1, f"run {run}: its artifact params.yaml is lost", ".mlflow/artifacts/")


def test_a_run_that_is_gone_is_replaced_by_the_one_that_read_it(vqmoe, root, no_stage):
    pretrained = run_id(root, "pretrain", "vqmoe-s0")
    client = store.connect(root)
    prepared = client.get_run(pretrained).data.tags["vqmoe.upstream.prepare"]
    client.delete_run(prepared)
    result = vqmoe("reproduce", pretrained)
    client.restore_run(prepared)
    assert f"Run {prepared} (prepare) is gone" in result.output
    assert f"Running prepare as in run {pretrained}" in result.output


class Made:
    """A run that read others, by their names, and wrote what `wrote` says."""

    def __init__(self, name, stage, task=None, wrote="", **upstream):
        self.id, self.status = name, "FINISHED"
        self.params = {"method": "smoe", "seed": "0"} | ({"task": task} if task else {})
        self.tags = {"vqmoe.stage": stage} | {f"vqmoe.upstream.{key.replace('__', '.')}": run for key, run in upstream.items()}
        if wrote:
            self.tags[f"md5.out.outputs/{stage}"] = wrote

    def text(self, name):
        return "data: {tasks: {a: x, b: y}}"

    def has(self, name):
        return False


def planned(monkeypatch, last, *others):
    made = {run.id: run for run in others}
    monkeypatch.setattr(tracking, "find", lambda root, run_id: [made[run_id]] if run_id in made else [])
    return [(step.run.id, step.stage) for step in reproduce.plan(reproduce.Step.of(last), None)]


def test_what_two_stages_read_is_made_once_if_it_was_the_same(monkeypatch):
    prepare = Made("d1", "prepare", wrote="same"), Made("d2", "prepare", wrote="same")
    pretrain = Made("p1", "pretrain", prepare="d1")
    warmup = Made("w1", "warmup", "a", prepare="d2", pretrain="p1")
    finetune = Made("f1", "finetune", "a", prepare="d1", warmup="w1")
    steps = planned(monkeypatch, finetune, *prepare, pretrain, warmup)
    assert steps == [("d1", "prepare"), ("p1", "pretrain"), ("w1", "warmup"), ("f1", "finetune")]


def test_what_stages_read_of_two_runs_is_made_twice_and_the_right_one_stays(monkeypatch):
    prepare = Made("d1", "prepare", wrote="one"), Made("d2", "prepare", wrote="other")
    pretrain = Made("p1", "pretrain", prepare="d1", wrote="one"), Made("p2", "pretrain", prepare="d2", wrote="other")
    tuned = []
    for task in "ab":
        tuned.append(Made(f"w{task}", "warmup", task, prepare="d1", pretrain="p1"))
        tuned.append(Made(f"f{task}", "finetune", task, prepare="d1", warmup=f"w{task}"))
    cells = {"pretrain__smoe-s0": "p2", "finetune__smoe-s0-a": "fa", "finetune__smoe-s0-b": "fb"}
    last = Made("r", "robustness", prepare="d2", **cells)
    assert [run for run, _ in planned(monkeypatch, last, *prepare, *pretrain, *tuned)] == [
        *("d1", "p1", "wa", "fa", "wb", "fb"),
        *("d2", "p2", "r"),
    ]


def test_what_is_measured_is_not_compared():
    names = ["train/both/flops_per_token", "parameters/total", "saving/infer/flops", "train/both/low", "saving/infer/seconds"]
    assert [reproduce._counts("compute", name) for name in names] == [True, True, True, False, False]
    assert not reproduce._counts("pretrain", "cost/seconds")
    assert reproduce._counts("pretrain", "test/bpc")


def test_a_step_of_compute_has_no_seed_on_the_command_line():
    step = reproduce.Step(Made("c", "compute"), "compute", Cell("smoe", 0))
    assert reproduce.arguments(step) == ["compute", "--method", "smoe"]
