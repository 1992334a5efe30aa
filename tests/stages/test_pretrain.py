"""What the stage writes about routing, one validation after another."""

import csv

import numpy as np
import pytest
from safetensors.numpy import load_file

from pipeline.data.batches import write_tokens
from pipeline.data.tokenizers import Tokenizer
from stages import pretrain
from stages.paths import SECTIONS, Cell, Paths


@pytest.fixture
def paths(corpus_folder, tmp_path):
    """Tokens of the folder corpus, as `prepare` leaves them."""
    paths, tokenizer = Paths(tmp_path, tmp_path / "out"), Tokenizer.bytes()
    paths.source.mkdir(parents=True)
    tokenizer.save(paths.source / "tokenizer.json")
    for split in ("train", "valid", "test"):
        write_tokens(paths.source / f"{split}.npy", [tokenizer.encode((corpus_folder / f"{split}.txt").read_text())])
    np.save(paths.source / "test.documents.npy", np.array([0, 100, 600]))
    return paths


def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


LOAD = {"imbalance", "entropy", "variation", "unused"}


@pytest.mark.parametrize(
    ("method", "names"),
    [("vqmoe", {*LOAD, "margin", "utilisation", "perplexity"}), ("smoe", {*LOAD, "margin"}), ("dense", set())],
)
def test_every_validation_and_layer_has_its_routing(tiny_params, paths, method, names):
    params, cell, logged = tiny_params(), Cell(method, 0), {}
    metrics = pretrain.run(
        params.select(SECTIONS["pretrain"], method), paths, cell, lambda values, step: logged.setdefault(step, {}).update(values)
    )
    folder = paths.output("pretrain", cell)
    routing, history = rows(folder / "routing.csv"), rows(folder / "history.csv")
    assert [(row["step"], row["layer"]) for row in routing] == [("6", "0"), ("6", "1"), ("12", "0"), ("12", "1")]
    for row in routing:
        fluctuates = {"fluctuation"} if names and row["step"] == "12" else set()
        assert {name for name, value in row.items() if value} == {"step", "layer"} | names | fluctuates
    means = {"imbalance": "load_imbalance", "unused": "load_unused", "margin": "margin", "fluctuation": "fluctuation"}
    for name in names & means.keys() | ({"fluctuation"} if names else set()):
        mean = sum(float(row[name]) for row in routing[2:]) / 2
        assert logged[12][f"valid/{means[name]}"] == float(history[1][f"valid/{means[name]}"]) == pytest.approx(mean)
    assert "valid/fluctuation" not in logged[6]
    units = load_file(folder / "units.safetensors")
    assert units.keys() == {*(("both", "discrete") if method == "vqmoe" else ("router",) if names else ("dense",)), "groups"}
    # Of segments of 32 tokens.
    starts = np.arange(0, 32 * len(units["groups"]), 32)
    assert units["groups"].tolist() == [0 if start < 100 else 1 if start < 600 else 2 for start in starts]
    assert metrics["valid"] == {"bpc": min(float(row["valid/bpc"]) for row in history)}
