"""The command line as a user meets it: whole runs of the tiny experiment, and every bad input as one line."""

import csv
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

import cli
from pipeline.moe.layer import SETTINGS
from stages.paths import GRID_STAGES, TASK_STAGES
from tests.conftest import REPOSITORY

ALL = ("prepare", *GRID_STAGES, "compute", "report")


def place(stage, method):
    """Where a stage of the tiny experiment has its files, under outputs and results."""
    return f"{stage}/{method}-s0" + ("/toy" if stage in TASK_STAGES else "")


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    """An empty repository with the default params; commands run inside it."""
    root = tmp_path / "repository"
    (root / "data").mkdir(parents=True)
    for name in ("params.yaml", "dvc.yaml"):
        shutil.copy(REPOSITORY / name, root)
    monkeypatch.chdir(root)
    return root


@pytest.fixture
def vqmoe(workspace, tiny_overrides):
    """Run a command; the overrides make the experiment tiny."""

    def call(*arguments, overrides=(), tiny=True):
        options = [part for override in (*(tiny_overrides if tiny else ()), *overrides) for part in ("-S", override)]
        return CliRunner().invoke(cli.main, [*arguments, *options])

    return call


def assert_one_line(result, code, *parts):
    assert result.exit_code == code, result.output
    lines = [line for line in result.output.splitlines() if line.startswith("vqmoe: ")]
    assert len(lines) == 1, result.output
    assert "Traceback" not in result.output
    for part in parts:
        assert part in lines[0], lines[0]


def no_leftovers(root):
    return not [path for path in root.rglob("*") if path.name.endswith(".tmp")]


def test_help_is_instant_and_explains_the_workflow():
    code = (
        "import sys\nfrom cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
        "for heavy in ('torch', 'mlflow', 'pydantic', 'numpy'): assert heavy not in sys.modules, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "prepare > pretrain > warmup > finetune > robustness > report" in done.stdout
    assert "vqmoe ui" in done.stdout


@pytest.mark.parametrize("method", ["vqmoe", "smoe"])
def test_stages_one_by_one_then_a_report(vqmoe, workspace, method):
    only = ("grid.methods=[" + method + "]",)
    for stage in ALL:
        result = vqmoe(stage, overrides=only)
        assert result.exit_code == 0, (stage, result.output)
    for stage in GRID_STAGES:
        found = json.loads((workspace / f"results/{place(stage, method)}.json").read_text())
        assert (found["method"], found["seed"], found.get("task")) == (method, 0, "toy" if stage in TASK_STAGES else None)
        assert len(found["run_id"]) == 32
    pretrain = json.loads((workspace / f"results/pretrain/{method}-s0.json").read_text())["metrics"]
    assert ("bpc_discrete" in pretrain["test"]) is (method == "vqmoe")
    assert 0 < pretrain["test"]["bpc"] < 9
    warmup = json.loads((workspace / f"results/warmup/{method}-s0/toy.json").read_text())["metrics"]
    assert warmup["after"]["bpc"] <= warmup["before"]["bpc"]
    assert ("code_utilisation" in warmup["after"]) is (method == "vqmoe")
    finetune = json.loads((workspace / f"results/finetune/{method}-s0/toy.json").read_text())["metrics"]
    assert set(finetune["test"]) == set(finetune["scratch"]) == {"nats", "accuracy", "macro_f1"}
    assert finetune["flops_per_token"] < pretrain["flops_per_token"]
    report = (workspace / "report/report.md").read_text()
    assert f"| measure | {method} | note |" in report
    assert "| test bits per character |" in report
    assert "TF-IDF" in result.output
    for name in ("training", "severity-language", "severity-toy", "confusion-toy", "expert-load-language", "expert-load-toy"):
        assert (workspace / f"report/figures/{name}.png").stat().st_size > 5000
        assert f"](figures/{name}.png)" in report
    assert (workspace / "report/figures/code-load-toy.png").exists() is (method == "vqmoe")
    assert no_leftovers(workspace)


def test_the_other_methods_pass_through_all_stages_into_one_report(vqmoe, workspace):
    # The last two are for images.
    others = [method for method in SETTINGS if method not in ("vqmoe", "smoe", "vmoe", "softmoe")]
    quick = ("model.layers=1", "robustness.kinds=[swap]", "robustness.rates=[0.1]", "finetune.scratch=false")
    overrides = (f"grid.methods=[{', '.join(others)}]", *quick)
    assert vqmoe("prepare", overrides=overrides).exit_code == 0
    further = {"vqmoe_released": {"bpc_discrete", "bpc_router"}, "smoe_dropout": {"bpc_router"}, "hyperrouter": {"bpc_router"}}
    for method in others:
        for stage in (*GRID_STAGES, "compute"):
            result = vqmoe(stage, "--method", method, overrides=overrides)
            assert result.exit_code == 0, (method, stage, result.output)
        pretrain = json.loads((workspace / f"results/pretrain/{method}-s0.json").read_text())["metrics"]
        assert set(pretrain["test"]) == {"bpc"} | further.get(method, set())
    trained, tuned = (
        load_file(workspace / f"outputs/{place(stage, 'stablemoe')}/model.safetensors") for stage in ("pretrain", "finetune")
    )
    assert trained["blocks.0.moe.router.frozen"]
    for name in ("frozen", "light.0.weight", "light.1.weight"):
        assert torch.equal(tuned[f"backbone.blocks.0.moe.router.{name}"], trained[f"blocks.0.moe.router.{name}"])
    result = vqmoe("report", overrides=overrides)
    assert result.exit_code == 0, result.output
    assert f"| measure | {' | '.join(others)} | note |" in (workspace / "report/report.md").read_text()


def test_train_runs_all_stages_in_a_folder_of_its_own_and_the_same_seed_gives_the_same_files(vqmoe, workspace):
    folders, printed = [], []
    for name in ("first", "second"):
        result = vqmoe("train", "--method", "vqmoe", "--seed", "3")
        assert result.exit_code == 0, result.output
        printed.append(result.output)
        (made,) = (workspace / "runs").iterdir()
        folders.append(made.rename(workspace / name))
    assert not (workspace / "outputs").exists()
    assert "test bits per character" in printed[0]
    assert "vqmoe ui" in printed[0]
    compared = 0
    for path in (workspace / "first/outputs").rglob("*"):
        if path.is_file():
            other = workspace / "second" / path.relative_to(workspace / "first")
            assert path.read_bytes() == other.read_bytes(), path
            compared += 1
    assert compared > 15
    from pipeline.tracking import store

    client = store.connect(workspace)
    found = {e.name: client.search_runs([e.experiment_id]) for e in client.search_experiments() if e.name.startswith("vqmoe/")}
    names = {stage: "vqmoe-s3-toy" if stage in TASK_STAGES else "vqmoe-s3" for stage in GRID_STAGES}
    names |= {"prepare": "prepare", "compute": "vqmoe-s0", "report": "report"}
    assert {name: [run.info.run_name for run in runs] for name, runs in found.items()} == {
        f"vqmoe/{stage}": [name] * 2 for stage, name in names.items()
    }
    assert {run.info.status for runs in found.values() for run in runs} == {"FINISHED"}
    finetune = found["vqmoe/finetune"][0]
    assert finetune.data.params["method"] == "vqmoe"
    assert finetune.data.params["model.width"] == "16"
    upstream = {run.info.run_id for run in found["vqmoe/warmup"]}
    assert finetune.data.tags["vqmoe.upstream.warmup"] in upstream
    assert finetune.inputs.dataset_inputs[0].dataset.source.endswith('outputs/data/tasks/toy"}')
    assert any(tag.startswith("md5.in.") and tag.endswith("task.csv") for tag in found["vqmoe/prepare"][0].data.tags)
    # What a chart of all methods shows of the robustness: the mean over kinds, whatever the mode is called.
    with open(workspace / "second/outputs/robustness/vqmoe-s3/scores.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if (row["model"], row["mode"]) == ("language", "discrete")]
    curve = client.get_metric_history(found["vqmoe/robustness"][0].info.run_id, "curve/language/noise/kappa")
    assert [point.step for point in curve] == [0, 50, 200]
    last = [float(row["kappa"]) for row in rows if (row["family"], row["rate"]) == ("noise", "0.2")]
    assert len(last) > 3 and curve[-1].value == pytest.approx(sum(last) / len(last))
    tables = {artifact.path for artifact in client.list_artifacts(finetune.info.run_id)}
    assert {"confusion.csv", "classes.csv", "history.csv"} <= tables


def test_the_settings_of_methods_that_do_not_run_do_not_matter(vqmoe):
    unfit = ("methods.vqmoe.codes=3",)
    assert vqmoe("prepare", "-S", "grid.methods=[smoe]", overrides=unfit).exit_code == 0
    result = vqmoe("pretrain", "--method", "smoe", overrides=unfit)
    assert result.exit_code == 0, result.output
    assert_one_line(vqmoe("pretrain", "--method", "vqmoe", overrides=unfit), 2, "params.yaml: in methods.vqmoe: codes is 3")


@pytest.mark.parametrize(("kind", "view"), [("characters", "text27"), ("words", "bytes")])
def test_other_tokenizers_go_through_all_stages(vqmoe, workspace, kind, view):
    overrides = (f"data.tokenizer={kind}", f"data.view={view}", "grid.methods=[smoe]", "robustness.kinds=[swap, insert, word]")
    for stage in ALL:
        result = vqmoe(stage, overrides=overrides)
        assert result.exit_code == 0, (stage, result.output)
    robustness = json.loads((workspace / "results/robustness/smoe-s0.json").read_text())["metrics"]
    assert set(robustness["language"]["router"]) == {"clean", "noise", "attack", "other"}
    assert set(robustness["toy"]["router"]) == {"clean", "noise", "attack"}
    assert set(robustness["language"]["router"]["noise"]) == {"score", "degradation", "consistency", "kappa"}
    assert ("consistency" in robustness["toy"]["router"]["noise"]) is (kind == "characters")
    # The shift leads to the same text, here.
    assert robustness["language"]["router"]["other"]["degradation"] == pytest.approx(0, abs=1e-6)


def test_transformer_xl_on_words(vqmoe, workspace):
    keys = ("positions=relative", "memory=24", "evaluate_context=16", "evaluate_memory=40", "norm=post", "cutoffs=[8, 16]")
    quick = ("grid.methods=[vqmoe]", "finetune.scratch=false", "robustness.kinds=[swap]", "robustness.rates=[0.1]")
    overrides = ["data.tokenizer=words", "data.view=bytes", *quick, *(f"model.{key}" for key in keys)]
    for stage in ALL:
        result = vqmoe(stage, overrides=overrides)
        assert result.exit_code == 0, (stage, result.output)
    metrics = json.loads((workspace / "results/pretrain/vqmoe-s0.json").read_text())["metrics"]
    assert set(metrics["test"]) == {"perplexity", "perplexity_discrete"}
    # With equal probabilities of the 10 entries of the head and the words of its widest cluster.
    words = json.loads((workspace / "outputs/data/manifest.json").read_text())["ids"]
    assert 1 < metrics["test"]["perplexity"] < 10 * (words - 16)
    report = (workspace / "report/report.md").read_text()
    assert "| test perplexity |" in report
    assert "bits per character |" not in report
    assert (workspace / "report/figures/training.png").stat().st_size > 5000


def test_other_seeds_give_other_models(vqmoe, workspace):
    assert vqmoe("prepare").exit_code == 0
    for seed in ("0", "1"):
        assert vqmoe("pretrain", "--method", "smoe", "--seed", seed).exit_code == 0
    one, other = (workspace / f"outputs/pretrain/smoe-s{seed}/model.safetensors" for seed in (0, 1))
    assert one.read_bytes() != other.read_bytes()


@pytest.mark.parametrize(
    ("arguments", "code", "parts"),
    [
        (["pretrain", "--method", "nosuch"], 2, ["params.yaml: method 'nosuch'", "vqmoe, smoe"]),
        (["pretrain", "--method", ""], 2, ["method '' has no section"]),
        (["pretrain", "--method", "smoe, xmoe"], 2, ["method 'smoe, xmoe' has no section"]),
        (["pretrain", "--method", "a]"], 2, ["method 'a]' has no section"]),
        (["pretrain", "-S", "pretrain.stepz=1"], 2, ["unknown key pretrain.stepz", "did you mean steps?"]),
        (["pretrain", "-S", "model.norm=middle"], 2, ["model.norm is 'middle'"]),
        (["pretrain", "-S", "model.norm=prae"], 2, ["model.norm is 'prae'", "'pre' or 'post' (did you mean pre?)"]),
        (["pretrain", "--params", "none.yaml"], 2, ["none.yaml: no such params file", "name one with --params"]),
        (["finetune", "--task", "nosuch"], 2, ["task 'nosuch' is not one of data.tasks; there are: toy"]),
        (["pretrain"], 1, ["outputs/data/source: not found", "run the stage that makes it first"]),
        (["report"], 1, ["results/prepare.json: not found"]),
    ],
)
def test_usage_errors(vqmoe, arguments, code, parts):
    assert_one_line(vqmoe(*arguments), code, *parts)


def test_a_cell_that_is_not_in_the_grid(vqmoe, workspace):
    result = vqmoe("grid", "--jobs", "2", "vqmoe-s1", tiny=False)
    assert_one_line(result, 2, "there is no cell 'vqmoe-s1' in the grid; there are: vqmoe-s0, smoe-s0")
    assert not (workspace / "outputs").exists()


def test_a_disk_that_is_full_is_one_line_and_a_closed_pipe_is_none(served, tmp_path):
    (tmp_path / "a.txt").write_text("a\n" * 100_000)
    commands = (
        ["preset"],
        ["classify", "--model", served("classifier"), "--text", "a"],
        ["generate", "--model", served(), "--length", "1"],
    )
    for command in commands:
        with open("/dev/full", "w") as full:
            done = subprocess.run(["vqmoe", *command], cwd=REPOSITORY, stdout=full, stderr=subprocess.PIPE, text=True)
        said = "vqmoe: standard output: cannot be written (No space left on device); free space and run again\n"
        assert (done.returncode, done.stderr) == (1, said)
    for command in (f"vqmoe classify --model {tmp_path}/classifier {tmp_path}/a.txt", "vqmoe preset"):
        done = subprocess.run(f"{command} | head -1", shell=True, cwd=REPOSITORY, capture_output=True, text=True)
        assert len(done.stdout.splitlines()) == 1 and done.stderr == ""


@pytest.mark.parametrize(("value", "quiet"), [("0", False), ("false", False), ("1", True)])
def test_quiet_is_what_the_variable_says(vqmoe, monkeypatch, value, quiet):
    monkeypatch.setenv("VQMOE_QUIET", value)
    done = vqmoe("prepare")
    assert done.exit_code == 0 and (done.stderr == "") is quiet


@pytest.mark.parametrize("command", [["generate"], ["route", "--text", "a"], ["train"]])
def test_a_seed_that_no_generator_takes_is_clicks_own(command):
    done = CliRunner().invoke(cli.main, [*command, "--seed", "9" * 20])
    assert done.exit_code == 2 and "is not in the range 0<=x<=2147483647" in done.output


def test_a_quiet_stage_says_nothing(vqmoe, monkeypatch):
    monkeypatch.setenv("VQMOE_QUIET", "")
    assert "prepare: " in vqmoe("prepare").stderr
    done = vqmoe("--quiet", "prepare")
    assert done.exit_code == 0 and done.output == ""


@pytest.mark.parametrize(
    ("words", "completed"),
    [
        ("vqmoe train --method sm", ["smoe", "smoe_dropout"]),
        ("vqmoe preset evidence/t", ["evidence/text"]),
        ("vqmoe gene", ["generate"]),
        ("vqmoe train -S finetune.val", ["finetune.validate_every=", "finetune.validate_passages="]),
        ("vqmoe train -S grid.s", ["grid.seeds="]),
        ("vqmoe train -S methods.vqmoe.codes", ["methods.vqmoe.codes="]),
        ("vqmoe warmup --task e", ["era"]),
        ("vqmoe compare --method xm", ["xmoe"]),
        ("vqmoe grid --jobs 2 vq", ["vqmoe-s0"]),
        ("vqmoe train --params nowhere.yaml --method sm", []),
    ],
)
def test_names_are_completed(words, completed):
    given = {"_VQMOE_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split()) - 1)}
    done = subprocess.run(["vqmoe"], env=os.environ | given, capture_output=True, text=True, cwd=REPOSITORY)
    assert done.stdout.split() == [f"plain,{name}" for name in completed] and done.stderr == ""


def test_models_are_completed_from_where_one_is(tmp_path):
    (tmp_path / "dvc.yaml").touch()
    (tmp_path / "params.yaml").write_text("{}")
    for place in ("pretrain/vqmoe-s0", "finetune/vqmoe-s0/era"):
        (tmp_path / "outputs" / place).mkdir(parents=True)
        (tmp_path / "outputs" / place / "model.json").touch()
    for folder, begun in ((tmp_path, ""), (tmp_path / "outputs/finetune", "../")):
        given = {"_VQMOE_COMPLETE": "bash_complete", "COMP_WORDS": f"vqmoe export --model {begun}", "COMP_CWORD": "3"}
        done = subprocess.run(["vqmoe"], env=os.environ | given, capture_output=True, text=True, cwd=folder)
        found = [line.removeprefix("plain,") for line in done.stdout.split()]
        wanted = [tmp_path / "outputs/finetune/vqmoe-s0/era", tmp_path / "outputs/pretrain/vqmoe-s0"]
        assert found == [name for name in (os.path.relpath(one, folder) for one in wanted) if name.startswith(begun)] != []


def test_unknown_options_and_commands_are_clicks_own(vqmoe):
    assert vqmoe("pretrain", "--learning-rate", "1").exit_code == 2
    assert vqmoe("no-such-stage", tiny=False).exit_code == 2


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("corpus/valid.txt", None, ["valid.txt: not found"]),
        ("corpus/test.txt", b"", ["the test split is empty"]),
        ("corpus/train.txt", b"abc\xff", ["train.txt: not UTF-8 at byte 3"]),
        ("corpus/valid.txt", b"too short", ["a split has", "lower model.context"]),
        (
            "task.csv",
            b"text,label,split\na,x,train\nb,y,train\nc,x,valid\nd,z,test\n",
            ["label 'z' is in test but never in train"],
        ),
    ],
)
def test_bad_data(vqmoe, workspace, tmp_path, name, content, parts):
    path = tmp_path / name
    path.unlink() if content is None else path.write_bytes(content)
    result = vqmoe("prepare")
    if result.exit_code == 0:
        result = vqmoe("pretrain")
        assert not list(workspace.glob("outputs/pretrain/*"))
    else:
        assert not (workspace / "outputs/data").exists()
    assert_one_line(result, 1, *parts)
    assert no_leftovers(workspace)


@pytest.mark.parametrize(
    ("name", "content", "stage", "parts"),
    [
        ("outputs/data/source/train.npy", None, "pretrain", ["train.npy: not found", "vqmoe prepare"]),
        ("outputs/data/tasks/toy", None, "pretrain", ["toy: not found", "vqmoe prepare"]),
        ("outputs/data/source/valid.npy", None, "pretrain", ["valid.npy: not as `vqmoe prepare` left it", "vqmoe prepare"]),
        ("outputs/data/source/train.npy", "flip", "pretrain", ["train.npy: not as `vqmoe prepare` left it", "vqmoe prepare"]),
        ("outputs/data/manifest.json", b"[]", "pretrain", ["manifest.json: holds list"]),
        ("outputs/data/manifest.json", "unsigned", "pretrain", ["manifest.json: has no sha256", "vqmoe prepare"]),
        ("outputs/data/manifest.json", b"{}", "pretrain", ["manifest.json: corpus is None there"]),
        ("results/prepare.json", b"{}", "pretrain", ["prepare.json: has no run_id and metrics"]),
        ("results/prepare.json", b"[]", "report", ["prepare.json: has no run_id and metrics"]),
    ],
)
def test_damage_between_stages(vqmoe, workspace, name, content, stage, parts):
    assert vqmoe("prepare").exit_code == 0
    if content is None:
        shutil.rmtree(workspace / name) if (workspace / name).is_dir() else (workspace / name).unlink()
    elif content == "flip":
        there = bytearray((workspace / name).read_bytes())
        there[-1] ^= 1
        (workspace / name).write_bytes(there)
    elif content == "unsigned":
        manifest = json.loads((workspace / name).read_text())
        (workspace / name).write_text(json.dumps({key: value for key, value in manifest.items() if key != "sha256"}))
    else:
        (workspace / name).write_bytes(content)
    results = (f"results/{stage}" for stage in (*GRID_STAGES, "compute"))
    for folder in ("outputs/pretrain", "outputs/finetune", "outputs/robustness", *results):
        (workspace / folder).mkdir(parents=True)
    assert_one_line(vqmoe(stage), 1, *parts)


def test_a_warm_up_that_does_not_help_is_undone(vqmoe, workspace):
    for stage in ("prepare", "pretrain"):
        assert vqmoe(stage).exit_code == 0
    assert vqmoe("warmup", overrides=["warmup.learning_rate=100.0"]).exit_code == 0
    metrics = json.loads((workspace / "results/warmup/vqmoe-s0/toy.json").read_text())["metrics"]
    assert metrics["best_step"] == 0
    assert metrics["after"] == metrics["before"]
    before, after = (workspace / f"outputs/{place(stage, 'vqmoe')}/model.safetensors" for stage in ("pretrain", "warmup"))
    assert before.read_bytes() == after.read_bytes()


def test_the_report_leaves_other_files_alone(vqmoe, workspace):
    (workspace / "report").mkdir()
    (workspace / "report/notes.md").write_text("mine")
    for stage in ALL:
        assert vqmoe(stage, overrides=["grid.methods=[smoe]"]).exit_code == 0
    assert (workspace / "report/notes.md").read_text() == "mine"
    assert (workspace / "report/report.md").exists()


def test_a_failed_stage_is_recorded_as_failed(vqmoe, workspace):
    assert vqmoe("prepare").exit_code == 0
    assert_one_line(
        vqmoe("pretrain", overrides=["pretrain.learning_rate=1e30", "pretrain.clip=1e30"]), 1, "at step", "lower learning_rate"
    )
    assert not (workspace / "outputs/pretrain").exists() or not list((workspace / "outputs/pretrain").iterdir())
    from pipeline.tracking import store

    client = store.connect(workspace)
    (run,) = client.search_runs([client.get_experiment_by_name("vqmoe/pretrain").experiment_id])
    assert run.info.status == "FAILED"
    assert "at step" in run.data.tags["vqmoe.error"]


def test_a_checkpoint_of_another_configuration(vqmoe, workspace):
    assert vqmoe("prepare").exit_code == 0
    assert vqmoe("pretrain").exit_code == 0
    assert_one_line(
        vqmoe("warmup", overrides=["model.expert_width=24"]), 1, "model.json: model.expert_width is 16 there and 24 here"
    )
    tokenizer = "outputs/data/source/tokenizer.json"
    assert (workspace / "outputs/pretrain/vqmoe-s0/tokenizer.json").read_bytes() == (workspace / tokenizer).read_bytes()
    weights = workspace / "outputs/pretrain/vqmoe-s0/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert_one_line(vqmoe("warmup"), 1, "model.safetensors: not the weights that model.json describes")
    assert not [path for path in (workspace / "outputs/warmup").rglob("*") if path.is_file()]


def test_a_model_does_not_read_the_ids_of_another_tokenizer(vqmoe, workspace, corpus_folder):
    words = ("data.tokenizer=words", "data.view=bytes", "data.vocabulary=8", "robustness.kinds=[swap]")
    for stage in ("prepare", "pretrain", "warmup", "finetune"):
        assert vqmoe(stage, overrides=words).exit_code == 0
    train = corpus_folder / "train.txt"
    train.write_text(" ".join(reversed(train.read_text().replace("alpha", "omega").split())), encoding="utf-8")
    assert vqmoe("prepare", overrides=words).exit_code == 0
    result = vqmoe("robustness", overrides=words)
    assert_one_line(result, 1, "model.json: tokenizer is", "here; run the stage that makes it again")


def test_data_prepared_with_other_params(vqmoe, workspace):
    assert vqmoe("prepare").exit_code == 0
    result = vqmoe("pretrain", overrides=["data.view=bytes"])
    assert_one_line(result, 1, "manifest.json: view is 'text27' there and 'bytes' in params", "run `vqmoe prepare` again")
    assert not list(workspace.glob("outputs/pretrain/*"))


def test_the_params_file_is_found_from_a_folder_inside_the_repository(vqmoe, workspace, monkeypatch):
    monkeypatch.chdir(workspace / "data")
    assert vqmoe("prepare").exit_code == 0
    assert (workspace / "outputs/data/manifest.json").exists()


def test_an_unwritable_output_folder(vqmoe, workspace):
    # A file where the folder should be cannot be written into by anyone, root included.
    (workspace / "outputs").write_text("")
    assert_one_line(vqmoe("prepare"), 1, "outputs/data: cannot be written", "free space or permissions")


def test_a_killed_stage_leaves_the_last_good_output(vqmoe, workspace, tiny_overrides):
    assert vqmoe("prepare").exit_code == 0
    assert vqmoe("pretrain").exit_code == 0
    before = (workspace / "outputs/pretrain/vqmoe-s0/model.safetensors").read_bytes()
    options = [part for override in (*tiny_overrides, "pretrain.steps=100000") for part in ("-S", override)]
    process = subprocess.Popen(
        [sys.executable, "-c", "from cli import main; main()", "pretrain", *options],
        cwd=workspace,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        stderr=subprocess.PIPE,
        text=True,
    )
    for line in process.stderr:
        if line.startswith("pretrain vqmoe-s0"):
            break
    process.terminate()
    process.communicate()
    assert process.returncode == 143
    assert (workspace / "outputs/pretrain/vqmoe-s0/model.safetensors").read_bytes() == before
    from pipeline.tracking import store

    client = store.connect(workspace)
    runs = client.search_runs([client.get_experiment_by_name("vqmoe/pretrain").experiment_id])
    assert sorted(run.info.status for run in runs) == ["FINISHED", "KILLED"]


@pytest.mark.parametrize("rank", ["", "abc", "1"])
def test_a_rank_in_the_environment_counts_only_with_torchrun(vqmoe, workspace, monkeypatch, rank):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", rank)
    assert vqmoe("preset", tiny=False).exit_code == 2  # there are none in this folder
    for stage in ("prepare", "pretrain"):
        assert vqmoe(stage).exit_code == 0
    assert (workspace / "outputs/pretrain/vqmoe-s0/model.json").exists()


def test_a_current_folder_that_was_removed_is_one_line(tmp_path):
    gone = tmp_path / "gone"
    command = f"mkdir {gone} && cd {gone} && rmdir {gone} && exec {sys.executable} -P -c 'from cli import main; main()' preset"
    done = subprocess.run(
        ["sh", "-c", command], env=os.environ | {"PYTHONPATH": str(REPOSITORY)}, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (1, "")
    said = [line for line in done.stderr.splitlines() if not line.startswith(("sh:", "shell-init:"))]
    assert said == ["vqmoe: the current folder was removed; change into the repository, then run again"]


@pytest.mark.parametrize("stage", ["prepare", "pretrain"])
def test_a_repository_that_cannot_be_written_is_one_line(vqmoe, workspace, stage):
    if stage == "pretrain":
        assert vqmoe("prepare").exit_code == 0
        shutil.rmtree(workspace / ".resume")
    (workspace / ".resume").write_text("")
    assert_one_line(vqmoe(stage), 1, f"/.resume/{stage}-", "cannot be written (", "free space or permissions")
