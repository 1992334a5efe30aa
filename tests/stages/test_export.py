import json
import subprocess
import sys

import numpy as np
import pytest
from click.testing import CliRunner
from ruamel.yaml import YAML
from safetensors.numpy import save_file

import cli
from pipeline import serving
from pipeline.data.corpora import PUBLISHED
from pipeline.files import read_json, write_json
from pipeline.tracking import store
from stages.export import SOURCES, Origin, intervals
from stages.paths import Cell
from tests.conftest import REPOSITORY
from tests.tracking.conftest import DEAD

CLASSIFIER, LANGUAGE = "outputs/finetune/vqmoe-s0/toy", "outputs/pretrain/vqmoe-s0"
REFERENCES = "always answering the commonest label of train (majority): accuracy % 75.0, majority's accuracy % 50.0."
# Importing either is an error.
WITHOUT = """import sys
from pathlib import Path
sys.modules["mlflow"] = sys.modules["dvc"] = None
for name in ("mlflow", "dvc"):
    try: __import__(name)
    except ImportError: continue
    sys.exit(f"{name} can be imported")
"""


def export(*arguments):
    return CliRunner().invoke(cli.main, ["export", *map(str, arguments)])


def rows(card):
    return [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in card.splitlines() if line.startswith("|")]


def test_a_folder_that_is_loaded_without_mlflow_and_dvc(trained, tmp_path):
    target = tmp_path / "new/exported"
    done = export(target, "--model", CLASSIFIER)
    assert done.exit_code == 0, done.output
    names = ["README.md", "model.json", "model.safetensors", "tokenizer.json"]
    assert sorted(file.name for file in target.iterdir()) == names
    assert [file.name for file in target.parent.iterdir()] == ["exported"]
    # As the card says.
    code = (target / "README.md").read_text().partition("```python\n")[2].partition("\n```")[0]
    *before, last = code.splitlines()
    printed = f"import json\nprint(json.dumps(({last.partition('  #')[0]}).tolist()))"
    script = "\n".join([WITHOUT, *before, printed])
    used = subprocess.run(
        [sys.executable, "-c", script], cwd=target, env={"PYTHONPATH": str(REPOSITORY)}, capture_output=True, text=True
    )
    assert used.returncode == 0, used.stderr
    wanted_PL = serving.load(trained.root / CLASSIFIER).classify(["A text."])
    np.testing.assert_allclose(json.loads(used.stdout), wanted_PL, rtol=1e-5)


@pytest.mark.parametrize("by", ["folder", "run"])
def test_the_card_says_what_the_run_and_results_say(trained, tmp_path, by):
    run_id = read_json(trained.result("finetune", Cell("vqmoe", 0, "toy")), "")["run_id"]
    assert export(tmp_path / "out", "--model", CLASSIFIER if by == "folder" else run_id).exit_code == 0
    card = (tmp_path / "out/README.md").read_text()
    _, head, rest = card.split("---\n", 2)
    assert YAML(typ="safe").load(head)["pipeline_tag"] == "text-classification"
    parameters = sum(one.numel() for one in serving.load(trained.root / CLASSIFIER).model.parameters())
    assert f"\n# vqmoe: classifier of texts, toy\n\nA classifier of texts of {parameters:,} parameters" in rest
    assert f"Seed: 0. Run: {run_id}." in rest
    known = rows(card)
    # Units of one document are drawn together: half of the documents are right, so the interval may be all.
    (accuracy,) = (value for name, on, value in (row for row in known if len(row) == 3) if name == "accuracy %")
    assert accuracy.startswith("50.0 [") and accuracy != "50.0 [50.0, 50.0]"
    assert ("cross-entropy, nats", "validation data", "1.250") in known
    assert ("cross-entropy, nats", "test data", "1.750") in known
    assert ("pre-training", "sotu", *SOURCES["sotu"]) in known
    assert ("fine-tuning", "data/toy.csv", "not known", "not known") in known
    assert ("finetune.steps", "4") in known and ("model.width", "16") in known and ("labels", "a, b") in known
    assert REFERENCES in card


def test_what_to_compare_with_is_in_results_where_the_store_does_not_have_it(trained, tmp_path):
    def card():
        target = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
        assert export(target, "--model", CLASSIFIER).exit_code == 0
        return (target / "README.md").read_text()

    run_id = read_json(trained.result("prepare"), "")["run_id"]
    store.connect(trained.root).delete_run(run_id)
    assert REFERENCES in card()
    # Of other data.
    write_json(trained.result("prepare"), read_json(trained.result("prepare"), "") | {"run_id": "other"})
    assert "On the same test data" not in card()


def test_the_card_of_a_language_model_tells_its_modes_apart(trained, tmp_path):
    assert export(tmp_path / "out", "--model", LANGUAGE).exit_code == 0
    card = (tmp_path / "out/README.md").read_text()
    known = rows(card)
    assert ("bits per character", "validation data", "2.000") in known
    assert ("bits per character", "test data", "1.500 [1.500, 1.500]") in known
    assert ("bits per character, mode discrete", "test data", "1.625 [1.625, 1.625]") in known
    assert "In use it runs in the mode `discrete`. Scores that name no mode are of `both`." in card


def test_intervals_of_perplexities(tmp_path):
    save_file({"router": np.tile([2.0, 3.0, 4.0], 10), "dense": np.full(30, 1.0)}, tmp_path / "units.safetensors")
    found = intervals(tmp_path, Origin({"test/perplexity": 8.0, "test/perplexity_dense": 2.0}))
    assert found["test/perplexity_dense"][:3] == (2, 2, 2)
    value, low, high, _ = found["test/perplexity"]
    assert 4 <= low < value < high <= 16


def test_what_is_not_known_is_said_not_to_be(trained, tmp_path):
    (trained.root / CLASSIFIER).rename(tmp_path / "found")
    assert export(tmp_path / "out", "--model", tmp_path / "found").exit_code == 0
    card = (tmp_path / "out/README.md").read_text()
    assert "Seed: not known. Run: not known. Commit: not known." in card
    assert [part.partition("\n")[0] for part in card.split("\n## ") if "\n\nNot known." in part] == ["Data", "Training", "Scores"]


def test_results_of_other_weights_are_not_this_models(trained, tmp_path):
    path = trained.result("pretrain", Cell("vqmoe", 0))
    other = read_json(trained.result("pretrain", Cell("smoe", 0)), "")["run_id"]
    write_json(path, read_json(path, "") | {"run_id": other})
    done = export(tmp_path / "out", "--model", LANGUAGE)
    assert done.exit_code == 1 and "vqmoe-s0.json: is about other weights than lie in" in done.output
    assert not (tmp_path / "out").exists()


def test_nothing_is_overwritten(trained, tmp_path):
    (tmp_path / "empty").mkdir()
    assert export(tmp_path / "empty", "--model", LANGUAGE).exit_code == 0
    before = {file: file.read_bytes() for file in (tmp_path / "empty").iterdir()}
    (tmp_path / "file").write_text("mine")
    for target in ("empty", "file"):
        done = export(tmp_path / target, "--model", CLASSIFIER)
        assert done.exit_code == 2 and f"{target}: is there already; name a folder that is new or empty" in done.output
    assert {file: file.read_bytes() for file in (tmp_path / "empty").iterdir()} == before
    assert (tmp_path / "file").read_text() == "mine"


def test_provenance_is_that_of_the_data_folders_page():
    page = (REPOSITORY / "data/README.md").read_text()
    for name, (_, licence) in SOURCES.items():
        assert name in page and licence in page
    assert SOURCES.keys() >= PUBLISHED.keys() | {"sotu", "austen", "era"}


def test_a_folder_is_exported_without_its_store(trained, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", DEAD)
    done = export(tmp_path / "away", "--model", CLASSIFIER)
    assert done.exit_code == 0 and done.stderr.startswith(f"vqmoe: {DEAD}: runs cannot be read there")
    assert len(done.stderr.splitlines()) == 1 and "Seed: 0. Run: not known." in (tmp_path / "away/README.md").read_text()
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert export("out", "--model", trained.root / CLASSIFIER).exit_code == 0
    assert [file.name for file in elsewhere.iterdir()] == ["out"]


def test_a_result_names_a_run_by_its_whole_id(trained, tmp_path):
    path = trained.result("pretrain", Cell("vqmoe", 0))
    result = read_json(path, "")
    for number, run_id in enumerate(("", result["run_id"][:8])):
        write_json(path, result | {"run_id": run_id})
        assert export(tmp_path / f"{number}", "--model", LANGUAGE).exit_code == 0
        assert "Seed: 0. Run: not known." in (tmp_path / f"{number}/README.md").read_text()


def test_a_name_that_no_folder_can_have_is_one_line(trained):
    done = export("a" * 300, "--model", LANGUAGE)
    assert done.exit_code == 1 and "aaa: cannot be written (File name too long)" in done.output
    assert len(done.output.splitlines()) == 1
