import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

import cli
from pipeline.files import read_json
from pipeline.models.build import build
from pipeline.training import checkpoint
from stages.paths import Cell
from tests.conftest import REPOSITORY
from tests.models.test_vit import spec as vision_spec


def invoke(*arguments, input=None):
    return CliRunner().invoke(cli.main, [str(argument) for argument in arguments], input=input)


def test_a_text_goes_on_and_begins_as_the_model_read_it(served):
    folder = served(view="text27")
    done = [invoke("generate", "--model", folder, "--prompt", "The 1 ", "--length", 20, "--seed", 3) for _ in range(2)]
    assert done[0].exit_code == 0, done[0].output
    assert done[0].output == done[1].output
    assert done[0].output.startswith("the one ") and len(done[0].output) > len("the one ")


def test_texts_lines_and_standard_input_are_labelled(served, tmp_path):
    folder, file = served("classifier"), tmp_path / "lines.txt"
    file.write_text("first line\n\nsecond line\n")
    done = invoke("classify", "--model", folder, "--json", "--text", "given", file, "-", input="from outside\n")
    assert done.exit_code == 0, done.output
    rows = [json.loads(line) for line in done.output.splitlines()]
    assert [row["text"] for row in rows] == ["given", "first line", "", "second line", "from outside"]
    assert rows.pop(2) == {"text": "", "label": None, "probabilities": None}
    for row in rows:
        assert set(row["probabilities"]) == {"a", "b"} and sum(row["probabilities"].values()) == pytest.approx(1, abs=1e-5)
        assert row["label"] == max(row["probabilities"], key=row["probabilities"].get)
    table = invoke("classify", "--model", folder, "--text", "given " * 20)
    label, share, *text = table.output.split()
    assert label in ("a", "b") and 0.5 <= float(share) <= 1 and text[-1].endswith("...")


def test_every_line_has_one_in_its_place(served, tmp_path):
    folder, file = served("classifier", view="text27"), tmp_path / "lines.txt"
    # More than are labelled at a time, and what other readers take for the end of a line.
    lines = ["", "a\u2028b\x0cc", "日本", "  ", *map("line {}".format, range(100)), ""]
    file.write_bytes("".join(f"{line}\r\n" for line in lines).encode())
    table = invoke("classify", "--model", folder, file)
    labels = [line.split()[0] for line in table.output.splitlines()]
    assert table.exit_code == 0 and len(labels) == len(lines)
    assert [place for place, label in enumerate(labels) if label == "-"] == [0, 2, 3, len(lines) - 1]
    as_json = invoke("classify", "--model", folder, "--json", "-", input=file.read_bytes()).output
    rows = [json.loads(line) for line in as_json.removesuffix("\n").split("\n")]
    assert [row["text"] for row in rows] == lines and [row["label"] or "-" for row in rows] == labels
    nothing = invoke("classify", "--model", folder, "--text", "日本")
    assert nothing.exit_code == 0 and nothing.output.split() == ["-", "-", "日本"]


def test_a_file_without_a_line_is_named_and_the_others_are_labelled(served, tmp_path):
    folder, empty, full = served("classifier"), tmp_path / "empty.txt", tmp_path / "full.txt"
    empty.touch()
    full.write_text("\n")
    done = invoke("classify", "--model", folder, empty)
    assert done.exit_code == 1 and done.output == f"vqmoe: {empty}: empty; nothing to label\n"
    done = invoke("classify", "--model", folder, empty, full)
    assert done.exit_code == 1 and done.stdout == "-  -\n" and f"{empty}: empty" in done.stderr


def test_a_file_that_is_not_there_is_told_before_any_label(served, tmp_path):
    folder, full = served("classifier"), tmp_path / "full.txt"
    full.write_text("a\n" * 100)
    done = invoke("classify", "--model", folder, full, tmp_path / "ful.txt")
    assert done.exit_code == 1 and done.output == f"vqmoe: {tmp_path}/ful.txt: not found (did you mean {full}?)\n"


@pytest.mark.parametrize(
    ("kind", "arguments", "line"),
    [
        ("classifier", ["generate"], "a classifier; name a language model"),
        ("language-model", ["classify", "--text", "a"], "a language model; name a classifier"),
        ("classifier", ["classify"], "nothing to label"),
        ("classifier", ["classify", "missing.txt"], "missing.txt: not found"),
        ("language-model", ["generate", "--top-p", "2"], "top-p is 2.0"),
        ("language-model", ["generate", "--model", f"models:/x/{9**30}"], "a version has at most 9 digits; write models:/name@"),
        ("text27", ["generate", "--prompt", "日本"], "prompt '日本': nothing of it is left in the view of this model (text27"),
    ],
)
def test_what_cannot_be_done_is_one_line(served, kind, arguments, line):
    folder = served(view="text27") if kind == "text27" else served(kind)
    done = invoke(arguments[0], "--model", folder, *arguments[1:])
    assert done.exit_code == (1 if "not found" in line else 2)
    assert line in done.output and len(done.output.splitlines()) == 1


def test_the_three_forms_of_a_model_are_told(trained):
    done = invoke("generate", "--model", "zz")
    assert done.exit_code == 1 and len(done.output.splitlines()) == 1
    assert done.output.startswith("vqmoe: zz: no such folder")
    assert all(form in done.output for form in ("a folder with model.json", "a run id", "models:/name@alias"))
    assert invoke("generate", "--model", "outputs/pretrain/smo-s0").output.endswith("(did you mean outputs/pretrain/smoe-s0?)\n")
    (trained.root / "outputs/pretrain/vqmoe-s0").rename(trained.root / "elsewhere")
    done = invoke("generate")
    assert done.exit_code == 1 and "vqmoe-s0: not found; run `dvc repro`, or name a model by --model" in done.output


def test_a_model_is_named_by_its_run(trained):
    run_id = read_json(trained.result("finetune", Cell("smoe", 0, "toy")), "")["run_id"]
    by_run, by_folder = (
        invoke("classify", "--model", model, "--text", "a", "--json") for model in (run_id[:12], "outputs/finetune/smoe-s0/toy")
    )
    assert by_run.exit_code == 0 and by_run.output == by_folder.output
    routed = invoke("route", "--model", run_id[:12], "--model", "outputs/finetune/smoe-s0/toy", "--text", "ab", "--json")
    one, other = (json.loads(line) for line in routed.output.splitlines())
    assert one | {"model": ""} == other | {"model": ""}
    wrong = invoke("generate", "--model", run_id)
    assert wrong.exit_code == 2 and wrong.output.startswith(f"vqmoe: {run_id}: a classifier; name a language model")


def test_a_folder_needs_no_mlflow_and_comes_before_a_run(served, tmp_path):
    served("classifier").rename(tmp_path / "abcd")
    code = "import sys\nsys.modules['mlflow'] = None\nfrom cli import main\nmain(['classify', '--model', 'abcd', '--text', 'a'])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={"PYTHONPATH": str(REPOSITORY)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / ".mlflow").exists()


def test_json_is_json_and_lines_are_lines_whatever_is_in_them(served, tmp_path):
    folder = served("classifier", labels=("b\n\nc", "\x1b[1m"))
    texts = ["a\u00e9\x1b[1m", os.fsdecode(b"\xff")]
    given = [part for one in texts for part in ("--text", one)]
    printed = invoke("classify", "--model", folder, "--json", *given).stdout
    assert printed.isascii() and [json.loads(line)["text"] for line in printed.splitlines()] == texts
    table = invoke("classify", "--model", folder, *given).stdout
    assert len(table.splitlines()) == 2 and "\x1b" not in table
    first, second = table.splitlines()
    assert first.startswith((r"b\n\nc   ", r"\x1b[1m  ")) and first.endswith(r"  aé\x1b[1m") and second.endswith(r"  \udcff")


@pytest.mark.parametrize("encoding", ["ascii", "utf-8:strict"])
def test_what_an_encoding_lacks_is_escaped(served, encoding):
    done = subprocess.run(
        ["vqmoe", "classify", "--model", served("classifier"), "--text", b"\xc3\xa9\xff"],
        env=os.environ | {"PYTHONIOENCODING": encoding, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith(rb"\xe9\udcff" if encoding == "ascii" else b"\xc3\xa9" + rb"\udcff")


def test_what_comes_before_a_bad_line_is_labelled(served, tmp_path):
    folder, file = served("classifier"), tmp_path / "lines.txt"
    file.write_bytes(b"good\n" * 70 + b"b\xffd\ngood\n")
    for name in (file, "-"):
        done = invoke("classify", "--model", folder, name, input=file.read_bytes())
        assert done.exit_code == 1 and len(done.stdout.splitlines()) == 70
        assert "not UTF-8 at byte 351" in done.stderr and len(done.stderr.splitlines()) == 1


def test_what_comes_before_an_image_that_cannot_be_read_is_labelled(tmp_path, seeded):
    described = vision_spec("vqmoe").model_copy(update={"view": "rgb"})
    checkpoint.save(tmp_path, build(described), described)
    files = [tmp_path / f"{place}\n.png" for place in range(4)]
    for file in files:
        Image.fromarray(np.zeros((20, 20, 3), np.uint8)).save(file)
    files[2].write_text("no image")
    done = invoke("classify", "--model", tmp_path, *files)
    assert done.exit_code == 1 and "2\\n.png: cannot be decoded" in done.stderr
    assert [line.split()[-1] for line in done.stdout.splitlines()] == [rf"{tmp_path}/{place}\n.png" for place in range(2)]


def test_standard_input_that_is_closed_is_one_line(served):
    command = f"from cli import main; main(['classify', '--model', {str(served('classifier'))!r}, '-'])"
    done = subprocess.run(
        ["sh", "-c", '"$0" -c "$1" <&-', sys.executable, command], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.returncode == 1 and done.stderr == "vqmoe: -: standard input is closed; give it texts, or name files\n"


def test_names_that_no_file_can_have_and_folders_that_may_not_be_looked_into(served, tmp_path, monkeypatch):
    folder, long = served("classifier"), "a" * 300
    for arguments in (["generate", "--model", long], ["classify", "--model", folder, long]):
        done = invoke(*arguments)
        assert done.exit_code == 1 and done.output.startswith(f"vqmoe: {long}: no") and len(done.output.splitlines()) == 1
    stat = Path.stat

    def locked(path, **more):
        if tmp_path / "locked" in path.parents:
            raise PermissionError(13, "Permission denied", str(path))
        return stat(path, **more)

    (tmp_path / "locked").mkdir()
    monkeypatch.setattr(Path, "stat", locked)
    for place in ("locked", "locked/x"):
        done = invoke("generate", "--model", tmp_path / place)
        assert done.exit_code == 1 and done.output.startswith(f"vqmoe: {tmp_path}/{place}") and len(done.output.splitlines()) == 1
