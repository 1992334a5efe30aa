import csv
import json
import re
from types import SimpleNamespace
from typing import get_args

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file, save, save_file

from cli import main
from pipeline.config import TextData
from pipeline.data.tokenizers import Tokenizer
from pipeline.errors import Failure
from stages import report
from stages.paths import Cell
from tests.conftest import REPOSITORY
from tests.stages import made_up


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("made")
    params = made_up.params()
    paths = made_up.write(root, params)
    assert report.run(params, paths) == {}
    return SimpleNamespace(root=root, params=params, paths=paths, text=(root / "report/report.md").read_text())


@pytest.fixture
def small(tmp_path):
    """Params and paths of a small grid, not yet reported."""
    params = made_up.params(methods=("smoe", "dense"), seeds=(0,), tasks=("era",), resamples=100)
    return params, made_up.write(tmp_path, params, kinds=("swap",), rates=(0.1,))


def test_the_report_is_a_page_a_text_figures_and_the_data_of_each(made):
    folder = made.root / "report"
    assert {path.name for path in folder.iterdir()} == {"index.html", "report.md", "data", "figures"}
    figures = {path.stem for path in (folder / "figures").glob("*.png")}
    assert {path.stem for path in (folder / "data").glob("*.csv")} == figures | {"claims", "methods", "compute", "pairs", "gains"}
    assert set(re.findall(r"\]\(figures/(.*?)\.png\)", made.text)) == figures
    page = (folder / "index.html").read_text()
    assert all(f'download="{name}.csv"' in page for name in figures)


def test_the_text_has_claims_the_main_table_and_pairs_with_the_first_method(made):
    assert "| 28 % more robust than smoe: language model under noise |" in made.text
    assert "| measure | vqmoe | smoe | dense | note |" in made.text
    assert "| vqmoe - smoe |" in made.text and "| vqmoe - dense |" in made.text
    assert "| smoe - dense |" not in made.text
    assert "smoe - dense" in (made.root / "report/index.html").read_text()
    assert "fewer than" not in made.text


def test_timings_are_not_in_the_text_and_all_else_stays_the_same_to_the_byte(small):
    params, paths = small
    report.run(params, paths)
    first = contents(paths.report)
    result = paths.result("compute", Cell("smoe", 0))
    found = json.loads(result.read_text())
    found["metrics"]["train"]["router"]["tokens_per_second"] *= 1.1
    result.write_text(json.dumps(found))
    report.run(params, paths)
    changed = {str(name) for name, content in contents(paths.report).items() if content != first[name]}
    assert changed == {"index.html", "data/compute.csv"}


def test_a_grid_without_vqmoe_and_with_one_seed_says_so(small, capsys):
    params, paths = small
    report.run(params, paths)
    text, page = (paths.report / "report.md").read_text(), (paths.report / "index.html").read_text()
    assert "No claims: they are about vqmoe" in text and "No claims: they are about vqmoe" in page
    assert "1 seed: fewer than 3" in text and "1 seed: fewer than 3" in page
    printed = capsys.readouterr().out
    assert "Methods compared" in printed and "Claims of the paper" not in printed and "index.html" in printed


def test_one_method_has_no_pairs(tmp_path):
    params = made_up.params(methods=("dense",), seeds=(0,), tasks=("era",), resamples=100)
    report.run(params, made_up.write(tmp_path, params, kinds=("swap",), rates=(0.1,)))
    assert "One method: no pairs to compare." in (tmp_path / "report/report.md").read_text()


@pytest.mark.parametrize(
    "file",
    [
        "results/prepare.json",
        "results/compute/smoe.json",
        "results/finetune/smoe-s0/era.json",
        "outputs/pretrain/dense-s0/routing.csv",
        "outputs/finetune/smoe-s0/era/confusion.csv",
        "outputs/robustness/smoe-s0/units.safetensors",
    ],
)
def test_what_is_missing_is_one_line(small, file):
    params, paths = small
    (paths.out / file).unlink()
    with pytest.raises(Failure, match=rf"{re.escape(file)}: not found; run `dvc repro`$"):
        report.read(params, paths)


@pytest.mark.parametrize("value", ["nan", "inf", "much"])
def test_a_score_that_is_no_number_is_an_error(small, value):
    params, paths = small
    file = paths.out / "outputs/robustness/smoe-s0/scores.csv"
    file.write_text(re.sub(r"(swap,0\.1,)[^,]+", rf"\g<1>{value}", file.read_text(), count=1))
    with pytest.raises(Failure, match=rf"scores\.csv: score is '{value}', expected a finite number"):
        report.read(params, paths)


# What some methods and params have nothing of, and the report does without.
OPTIONAL = ("test.bpc_discrete", "code_error", "scratch", "/units.safetensors groups")
OF_LAYERS = "imbalance entropy variation unused margin output_cosine cka effective_rank utilisation perplexity".split()


def lacking(path):
    """A key, column or array that a file may lack, and its content without it; no name where only the values are gone."""
    if path.suffix == ".json":
        yield from ((name, json.dumps(value).encode()) for name, value in _lacking(json.loads(path.read_text())))
    elif path.suffix == ".csv":
        heads, *lines = csv.reader(path.open(newline=""))
        for place, head in enumerate(heads):
            rows = [(*line[:place], *line[place + 1 :]) for line in (heads, *lines)]
            yield head, "\n".join(map(",".join, rows)).encode()
            rows = [heads, *((*line[:place], "", *line[place + 1 :]) for line in lines)]
            yield None, "\n".join(map(",".join, rows)).encode()
    else:
        arrays = load_file(path)
        yield from ((name, save({key: array for key, array in arrays.items() if key != name})) for name in arrays)


def _lacking(value):
    for key, below in value.items():
        yield key, {name: one for name, one in value.items() if name != key}
        yield None, value | {key: None}
        if isinstance(below, dict):
            yield from ((name and f"{key}.{name}", value | {key: less}) for name, less in _lacking(below))


@pytest.mark.parametrize("stage", ["prepare", "pretrain", "warmup", "finetune", "robustness", "compute"])
def test_whatever_a_file_lacks_is_one_line(tmp_path, stage):
    params = made_up.params(methods=("vqmoe",), seeds=(0,), tasks=("era",), resamples=50)
    paths = made_up.write(tmp_path, params, kinds=("swap",), rates=(0.1,))
    told = 0
    for path in [path for path in sorted(tmp_path.rglob("*.*")) if f"/{stage}" in str(path) and path.is_file()]:
        whole = path.read_bytes()
        for lacks, content in lacking(path):
            path.write_bytes(content)
            try:
                report.show(report.read(params, paths))
            except Failure as error:
                assert str(error).endswith("; run `dvc repro`") and "\n" not in str(error)
                if lacks is not None:
                    assert str(error).startswith(f"{path}: ") and (lacks in str(error) or path.name == "confusion.csv"), error
                    told += 1
            else:
                assert lacks is None or f"{path} {lacks}".endswith((*OPTIONAL, *(f"layers.csv {name}" for name in OF_LAYERS)))
        path.write_bytes(whole)
    assert told >= 5


def test_a_model_is_scored_in_the_unit_of_its_tokenizer():
    kinds = get_args(TextData.model_fields["tokenizer"].annotation)
    assert report.UNITS == {kind: Tokenizer.make(kind, ["a b"], 300).unit for kind in kinds}


# Types of safetensors that numpy lacks, and how many of them are eight bytes.
LIES = (("BF16", 4), ("F8_E4M3", 8))


def test_damaged_files_are_one_line(small):
    params, paths = small
    table = paths.out / "outputs/pretrain/smoe-s0/history.csv"
    whole = table.read_text()
    for damaged in ("", "\n", "step,valid/bpc\n400\n", "step,valid/bpc\n"):
        table.write_text(damaged)
        with pytest.raises(Failure, match=r"history\.csv: (damaged|step is \[\]: list should have at least 1 item)"):
            report.read(params, paths)
    table.write_text(whole)
    lies = [json.dumps({"a": {"dtype": kind, "shape": [size], "data_offsets": [0, 8]}}).encode() for kind, size in LIES]
    for damaged in (b"no", *(len(head).to_bytes(8, "little") + head + bytes(8) for head in lies)):
        (paths.out / "outputs/robustness/smoe-s0/units.safetensors").write_bytes(damaged)
        with pytest.raises(Failure, match=r"units\.safetensors: cannot be read"):
            report.read(params, paths)


def test_a_unit_that_is_not_finite_is_an_error_and_leaves_no_report(small):
    params, paths = small
    file = paths.out / "outputs/robustness/smoe-s0/units.safetensors"
    units = load_file(file)
    units["era/router/swap/0.1/lost"][3] = np.nan
    save_file(units, file)
    with pytest.raises(Failure, match="not finite"):
        report.run(params, paths)
    assert not paths.report.exists()


def test_compare_prints_what_the_report_prints_and_writes_nothing(made, monkeypatch, capsys):
    (made.root / "dvc.yaml").touch()
    monkeypatch.chdir(made.root)
    before = contents(made.root)
    overrides = ["grid.methods=[vqmoe, smoe, dense]", "grid.seeds=[0, 1, 2]", "report.resamples=200"]
    overrides.append("data.tasks={era: era, banking77: banking77}")
    given = [part for override in overrides for part in ("-S", override)]
    done = CliRunner().invoke(main, ["compare", "--params", str(REPOSITORY / "params.yaml"), *given])
    assert done.exit_code == 0, done.output
    report.show(report.read(made.params, made.paths))
    assert done.output == capsys.readouterr().out
    assert "Claims of the paper" in done.output and "Methods compared" in done.output
    assert contents(made.root) == before
