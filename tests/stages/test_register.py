import json

import pytest
from click.testing import CliRunner

import cli
from pipeline.files import read_json, write_json
from pipeline.tracking import store
from stages.paths import Cell
from tests.tracking.conftest import DEAD

NAMES = ("vqmoe-language-model", "vqmoe-toy")


def vqmoe(*arguments):
    return CliRunner().invoke(cli.main, arguments)


def assert_one_line(done, code, *parts):
    assert done.exit_code == code, done.output
    (line,) = (line for line in done.output.splitlines() if line.startswith("vqmoe: "))
    for part in parts:
        assert part in line


def test_the_models_of_the_grid_are_registered_once(trained):
    runs = {
        (name, method): read_json(trained.result(stage, Cell(method, 0, task)), "")["run_id"]
        for name, stage, task in zip(NAMES, ("pretrain", "finetune"), (None, "toy"), strict=True)
        for method in ("vqmoe", "smoe")
    }
    first = vqmoe("register", "--json")
    assert first.exit_code == 0, first.output
    rows = json.loads(first.output)
    assert [(row["name"], row["version"], row["score"], row["tags"]["unit"], row["aliases"]) for row in rows] == [
        ("vqmoe-language-model", 1, 2.0, "bpc", ["vqmoe"]),
        ("vqmoe-language-model", 2, 1.75, "bpc", ["champion", "smoe"]),
        ("vqmoe-toy", 1, 1.25, "nats", ["vqmoe"]),
        ("vqmoe-toy", 2, 1.0, "nats", ["champion", "smoe"]),
    ]
    assert {(row["name"], row["tags"]["method"]): row["run_id"] for row in rows} == runs
    assert rows[3]["tags"] | {"validation": "1.0", "seed": "0", "task": "toy"} == rows[3]["tags"]
    assert vqmoe("register", "--json").output == first.output
    table = vqmoe("register").output
    assert "models:/vqmoe-toy/2" in table and runs["vqmoe-toy", "smoe"] in table
    registered = store.connect(trained.root).get_registered_model("vqmoe-toy")
    assert registered.description.startswith(
        "Each version is a classifier for toy (data/toy.csv), view text27, trained by vqmoe."
    )
    done = vqmoe("generate", "--model", "models:/vqmoe-language-model@champion", "--prompt", "a", "--length", "5")
    there = vqmoe("generate", "--model", "outputs/pretrain/smoe-s0", "--prompt", "a", "--length", "5")
    assert done.exit_code == 0 and done.output == there.output
    assert_one_line(vqmoe("classify", "--model", NAMES[1], "--text", "a"), 1, "vqmoe-toy: no such folder")


def test_models_that_were_validated_on_other_data_get_another_name(trained):
    assert vqmoe("register").exit_code == 0
    for part in ("source", "tasks/toy"):
        (trained.data / part / "valid").write_text("another text")
    # As if all had been run again.
    client = store.connect(trained.root)
    for run in client.search_runs([one.experiment_id for one in client.search_experiments()]):
        for tag in run.data.tags:
            if tag.startswith("md5.in."):
                client.set_tag(run.info.run_id, tag, "another")
    assert_one_line(vqmoe("register"), 2, "validated on other data than the versions of vqmoe-language-model", "experiment=mine")
    done = vqmoe("register", "-S", "tracking.experiment=mine", "--json")
    assert [row["name"] for row in json.loads(done.output)] == ["mine-language-model"] * 2 + ["mine-toy"] * 2


def test_how_much_of_the_validation_data_is_scored_counts_too(trained):
    assert vqmoe("register", "-S", "grid.methods=[vqmoe]").exit_code == 0
    client = store.connect(trained.root)
    other = read_json(trained.result("pretrain", Cell("smoe", 0)), "")["run_id"]
    client.log_param(other, "pretrain.validate_images", "7")
    assert_one_line(vqmoe("register"), 2, f"run {other}: validated on other data")


@pytest.mark.parametrize(
    ("change", "code", "parts"),
    [
        ({"run_id": "0" * 32}, 1, ["smoe-s0/toy.json: its run 00000", "not in this MLflow store; set MLFLOW_TRACKING_URI"]),
        ({"run_id": "offline-01234567"}, 1, ["its run offline-01234567 is not in", "`vqmoe track sync`"]),
        (None, 1, ["smoe-s0/toy.json: not found; run `dvc repro`"]),
    ],
)
def test_what_is_missing_is_told_before_anything_is_registered(trained, change, code, parts):
    path = trained.result("finetune", Cell("smoe", 0, "toy"))
    if change is None:
        path.unlink()
    else:
        write_json(path, read_json(path, "") | change)
    assert_one_line(vqmoe("register"), code, *parts)
    assert not store.connect(trained.root).search_registered_models()


def test_no_server(trained, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", DEAD)
    assert_one_line(vqmoe("register"), 1, f"{DEAD}: runs cannot be read there")
