import json
import shutil

import pytest
from click.testing import CliRunner

import cli
from tests.checking.conftest import json_lines, lay, root, rows  # noqa: F401
from tests.conftest import REPOSITORY


@pytest.fixture
def place(root, monkeypatch):  # noqa: F811
    shutil.copy(REPOSITORY / "dvc.yaml", root)
    monkeypatch.chdir(root)
    return root


def checked(*arguments):
    return CliRunner().invoke(cli.main, ["data", "check", *map(str, arguments)])


def test_findings_warnings_and_params_are_printed(place):
    lay(place, ".csv")
    done = checked("data/mine.csv")
    assert done.exit_code == 0 and done.stderr == ""
    lines = done.stdout.splitlines()
    assert lines[0] == "form            CSV, texts with labels; without splits, which are drawn"
    for name in ("encoding", "texts", "characters", "tokens", "classes", "  l0", "lengths", "duplicates", "empty", "view"):
        assert any(line.startswith(f"{name}  ") for line in lines), name
    assert any(line.startswith("! test has ") for line in lines)
    assert "\n  tasks:\n    mine: data/mine.csv\n" in done.stdout
    assert max(map(len, lines)) < 200


def test_several_are_described_in_turn_and_have_one_set_of_params(place):
    lay(place, ".csv")
    lay(place, ".txt")
    done = checked("data/mine.csv", "data/mine.txt")
    assert done.exit_code == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "data/mine.csv" and lines[1].startswith("form  ") and lines[lines.index("data/mine.txt") - 1] == ""
    assert done.stdout.count("Put this into params.yaml") == 1 == done.stdout.count("  corpus: ")
    assert "\n  corpus: data/mine.txt\n" in done.stdout and "\n    mine: data/mine.csv\n" in done.stdout
    assert checked(place / "data/mine.csv", "data/mine.csv").stdout == checked("data/mine.csv").stdout
    printed = json.loads(checked("data/mine.csv", "data/mine.txt", "--json").stdout)
    assert [found["path"] for found in printed["data"]] == ["data/mine.csv", "data/mine.txt"]
    assert printed["params"]["data"]["corpus"] == "data/mine.txt" and printed["problem"] is None


def test_of_several_the_faulty_are_named_and_a_wrong_name_is_said_at_once(place):
    lay(place, ".csv")
    (place / "data/a.csv").write_text("text\n")
    done = checked("data/a.csv", "data/mine.csv")
    assert done.exit_code == 1 and "classes" in done.stdout and "Put this" not in done.stdout
    first, second = done.stderr.splitlines()
    assert "a.csv: holds no records" in first and "mend data/a.csv first" in second
    done = checked("data/mine.csv", "data/none.csv")
    assert (done.exit_code, done.stdout) == (2, "") and "data/none.csv: not found" in done.stderr


def test_long_labels_are_whole(place):
    label = "language-resources-and-evaluation"
    (place / "data/a.jsonl").write_text(json_lines(row | {"label": label if i % 2 else "l0"} for i, row in enumerate(rows())))
    lines = checked("data/a.jsonl").stdout.splitlines()
    row = lines[lines.index(f"  {label}") + 1]
    assert row.startswith(" " * 16) and sum(map(int, row.split())) == 200


def test_json_has_the_same(place):
    lay(place, ".csv")
    found = json.loads(checked("data/mine.csv", "--json").stdout)
    assert found["path"] == "data/mine.csv" and found["problem"] is None and found["preset"] is None
    assert found["params"]["data"]["tasks"] == {"mine": "data/mine.csv"}
    assert sum(split["texts"] for split in found["splits"].values()) == 400
    assert found["warnings"]


def test_a_problem_comes_last_after_what_was_found(place):
    (place / "data/a.jsonl").write_text(json_lines([*rows(), {"text": "a", "label": ""}]))
    done = checked("data/a.jsonl")
    assert done.exit_code == 1
    assert done.stderr.startswith("vqmoe: ") and done.stderr.count("\n") == 1 and "line 401" in done.stderr
    assert "classes" in done.stdout and "Put this" not in done.stdout
    done = checked("data/a.jsonl", "--json")
    found = json.loads(done.stdout)
    assert done.exit_code == 1 and "line 401" in found["problem"] and found["params"] == {}


def test_a_name_that_is_none_is_said_at_once(place):
    done = checked("data/none.csv")
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr == "vqmoe: data/none.csv: not found; check the name\n"


def test_many_classes_are_cut_short_and_images_have_a_preset(place):
    (place / "data/a.jsonl").write_text(json_lines(row | {"label": f"class {i % 30}"} for i, row in enumerate(rows(3000))))
    lines = checked("data/a.jsonl").stdout.splitlines()
    assert sum(line.startswith("  class ") for line in lines) == 11 and any(line.startswith("  ...") for line in lines)
    lay(place, "images")
    done = checked("data/mine")
    assert "Begin with `vqmoe preset vision/digits > params.yaml`. Put this into params.yaml" in done.stdout
    assert "sizes           1 different; width min 28" in done.stdout and "modes           L 60" in done.stdout


def test_bytes_that_are_no_utf_8_are_listed(place):
    (place / "data/a.txt").write_bytes("für alle\n".encode("cp1252") * 50)
    done = checked("data/a.txt")
    assert "a.txt, byte 1 (0xfc), 10 (0xfc), 19 (0xfc), ..." in done.stdout
    assert "iconv -f WINDOWS-1252 -t UTF-8" in done.stderr


def test_a_class_is_one_line_whatever_its_name_has_in_it(place):
    found = [row | {"label": "b\n\n\x1b[1mc" if row["label"] == "l0" else "\u00e9"} for row in rows()]
    (place / "data/mine.jsonl").write_text(json_lines(found))
    done = checked("data/mine.jsonl")
    assert done.exit_code == 0 and r"\n  b\n\n\x1b[1mc".replace(r"\n  ", "\n  ", 1) in done.stdout and "\x1b" not in done.output
    printed = checked("data/mine.jsonl", "--json").stdout
    assert printed.isascii() and "b\n\n\x1b[1mc" in json.loads(printed)["classes"]
