import csv
import json
import re
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

import cli
from pipeline.errors import UsageError
from stages import report
from stages.compare import compare
from tests.conftest import REPOSITORY
from tests.stages import made_up


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A made-up grid, its report's numbers, and `print`: what a comparison prints."""
    root = tmp_path_factory.mktemp("made")
    params = made_up.params(methods=("vqmoe", "smoe", "dense"), seeds=(0, 1), tasks=("era",), resamples=100)
    paths = made_up.write(root, params, kinds=("swap",), rates=(0.1,))
    report.run(params, paths)
    main, timed = (list(csv.DictReader(open(paths.report / f"data/{name}.csv", newline=""))) for name in ("methods", "compute"))
    return SimpleNamespace(root=root, grid=report.read(params, paths), main=main, rows=[*main, *timed])


@pytest.fixture
def printed(made, capsys):
    def call(*wanted, sort=None, by="measure", form=None):
        compare(made.grid, wanted, sort, by, form)
        return capsys.readouterr().out

    return call


def cells(text):
    """Rows of a printed table."""
    return [[cell.strip() for cell in line[1:-1].split("│")] for line in text.splitlines() if line.startswith("│")]


def test_measures_are_chosen_by_a_part_of_their_names_or_a_glob(printed):
    assert [name for name, *_ in cells(printed("KAPPA"))] == [
        "experts unchanged by noise % - corrected for chance (kappa) %",
        "era: experts unchanged by noise % - corrected for chance (kappa) %",
    ]
    assert [name for name, *_ in cells(printed("test bits*r", "era: test*%", "test bits*r"))] == [
        "test bits per character",
        "era: test accuracy %",
        "era: test accuracy % - macro-F1 %",
        "era: test accuracy % - accuracy without pre-training %",
        "era: test accuracy % - macro-F1 without pre-training %",
    ]
    assert "tokens per second" in printed("training*second") and "tokens per second" not in printed()


def test_methods_are_rows_in_the_order_of_a_measure(printed, made):
    by = {(row["measure"], row["method"]): float(row["value"]) for row in made.rows}
    for name in ("test bits per character", "bits per token lost to noise"):
        order = sorted(made.grid.methods, key=lambda method: by[name, method])
        assert [method for method, *_ in cells(printed("macro", by="method", sort=name)) if method] == order
        assert [row["method"] for row in json.loads(printed(name, form="json", sort=name))][:3] == order
    # A method that has no such value is last.
    assert cells(printed("macro", by="method", sort="codebook perplexity"))[0][0] == "vqmoe"
    long = printed("accuracy without", by="method")
    assert "\\n" not in long and "era: test accuracy % -" in long.splitlines()[2]
    turned, straight = cells(printed("test bits", by="method")), cells(printed("test bits"))
    assert [row[1] for row in turned] == straight[0][1:4]


def test_pairs_with_the_first_method_stand_below_the_main_table(printed, made):
    rows = csv.DictReader(open(made.root / "report/data/pairs.csv", newline=""))
    wanted = [[row["measure"], f"vqmoe - {row['second']}"] for row in rows if row["first"] == "vqmoe"]
    assert [row[:2] for row in cells(printed())[-len(wanted) :]] == wanted and len(wanted) > 5


def test_data_are_the_numbers_of_the_report_with_seeds_and_runs(printed, made):
    as_csv = list(csv.DictReader(printed(form="csv").splitlines()))
    assert [{key: row[key] for key in made.main[0]} for row in as_csv] == made.main
    assert as_csv[0]["seeds"] == "0 1"
    assert as_csv[0]["finetune/era"].split() == made.grid.runs["finetune", "era"]["vqmoe"]
    chosen = json.loads(printed("peak memory", "lost to noise", form="json"))
    wanted = [row for row in made.rows if "lost to noise" in row["measure"] or "peak memory" in row["measure"]]
    assert {(row["measure"], row["method"], str(row["value"])) for row in chosen} == {
        (row["measure"], row["method"], row["value"]) for row in wanted
    }
    assert chosen[0]["seeds"] == [0, 1] and len(chosen[0]["runs"]["pretrain"]) == 2 and len(chosen[0]["runs"]["compute"]) == 1


@pytest.mark.parametrize(
    ("wanted", "sort", "message"),
    [
        ("acuracy", None, "no measure has 'acuracy' in its name, the nearest is 'accuracy'"),
        ("load imbalnce", None, "the nearest is 'load imbalance'"),
        ("era:*noize*", None, "no measure has 'era:*noize*'"),
        ("accuracy", "codebok", "the nearest is 'codebook'"),
        (
            "accuracy",
            "macro",
            "'macro' is in the names of 2 measures, name one to sort by: era: test accuracy % - macro-F1 %; era",
        ),
    ],
)
def test_names_that_there_are_not_are_told_with_the_nearest(made, wanted, sort, message):
    with pytest.raises(UsageError) as caught:
        compare(made.grid, [wanted], sort, "measure", None)
    assert message in str(caught.value)


def test_a_row_is_one_line_in_a_pipe_and_fits_a_narrow_terminal(printed, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    rows = json.loads(printed("without", form="json"))
    assert [row[0] for row in cells(printed("without"))] == list(dict.fromkeys(row["measure"] for row in rows))
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("NO_COLOR", "1")
    for by in ("measure", "method"):
        plain = re.sub(r"\x1b\[[013]?m", "", narrow := printed("accuracy", by=by))  # bold and italics are no colours
        assert "\x1b" in narrow and "\x1b" not in plain
        assert max(map(len, plain.splitlines())) <= 60
        intervals = [row for row in json.loads(printed("accuracy", form="json")) if row["low"] is not None]
        assert "…" not in plain and plain.count("[") == len(intervals) > 3


def test_the_command_takes_methods_of_its_own(made, monkeypatch):
    (made.root / "dvc.yaml").touch()
    monkeypatch.chdir(made.root)
    usual = ["--params", str(REPOSITORY / "params.yaml"), "-S", "grid.seeds=[0,1]", "-S", "report.resamples=100"]
    call = lambda *arguments: CliRunner().invoke(cli.main, ["compare", *usual, *arguments])  # noqa: E731
    done = call("accuracy", "--by", "method", "--method", "dense", "--method", "vqmoe")
    assert done.exit_code == 0, done.output
    assert [method for method, *_ in cells(done.output) if method] == ["dense", "vqmoe"]
    wrong = call("--method", "dens")
    assert wrong.exit_code == 2 and "did you mean dense?" in wrong.output and wrong.output.count("\n") == 1
