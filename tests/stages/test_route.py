import json
import re

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from rich.cells import cell_len

import cli
from pipeline.models.build import build
from pipeline.training import checkpoint
from stages import route
from tests.models.test_vit import spec as vision_spec


def invoke(*arguments):
    return CliRunner().invoke(cli.main, ["route", *(str(argument) for argument in arguments)])


@pytest.fixture
def image(tmp_path, seeded):
    """The folder of a model of images, and an image."""
    spec, folder = vision_spec("vqmoe").model_copy(update={"view": "rgb"}), tmp_path / "vision"
    folder.mkdir()
    checkpoint.save(folder, build(spec), spec)
    file = tmp_path / "image.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(file)
    return folder, file


def numbers(found, part, layer):
    return [experts[0] for experts in found[part]["layers"][layer]["experts"]]


def test_numbers_lie_under_their_tokens_where_there_are_no_colours(served):
    folder, text = served(), "The people of 1862."
    found = json.loads(invoke("--model", folder, "--text", text, "--noise", "replace", "--rate", 0.3, "--json").output)
    done = invoke("--model", folder, "--text", text, "--noise", "replace", "--rate", 0.3)
    assert done.exit_code == 0, done.output
    blocks = [block.splitlines() for block in done.output.strip().split("\n\n")]
    assert len(blocks) == 2 * 2 and "\x1b" not in done.output
    for place, (title, shown, marks, *carets) in enumerate(blocks):
        part, layer = ("clean", "noised")[place % 2], place // 2
        assert title.startswith(f"{folder.name}, block {layer}, by expert of 4")
        assert shown == "".join(found[part]["tokens"]).rstrip() and [int(mark) for mark in marks] == numbers(found, part, layer)
        if part == "noised":
            moved = found[part]["changed"][layer]
            assert f"{len(moved)} of {len(marks)} tokens" in title
            assert [at for at, mark in enumerate("".join(carets)) if mark == "^"] == moved


def test_on_a_terminal_every_token_has_the_colour_of_its_expert(served, monkeypatch):
    from rich.console import Console

    monkeypatch.setattr(route, "Console", lambda **more: Console(force_terminal=True, color_system="truecolor", **more))
    monkeypatch.delenv("NO_COLOR", raising=False)
    folder = served()
    found = json.loads(invoke("--model", folder, "--text", "people", "--json").output)
    lines = [line for line in invoke("--model", folder, "--text", "people").output.splitlines() if line]
    colours = re.findall(r"\x1b\[30;48;2;([\d;]+)m([a-z]+)\x1b", lines[2])
    assert "".join(part for _, part in colours) == "people"
    of = [colour for colour, part in colours for _ in part]
    wanted = numbers(found, "clean", 0)
    assert all((of[i] == of[j]) == (wanted[i] == wanted[j]) for i in range(6) for j in range(6))


def test_a_page_has_all_it_shows_inside(served, tmp_path):
    folder, page = served(), tmp_path / "page.html"
    text = 'He said "</script><b>" & left. ' * 3
    done = invoke("--model", folder, "--text", text, "--html", page, "--noise", "swap")
    assert done.exit_code == 0 and str(page) in done.output
    written = page.read_text()
    (data,) = re.findall(r"const MODELS = (.*);\n", written)
    (found,) = json.loads(data)
    assert "".join(found["clean"]["tokens"]) == text and written.count("</script>") == 1
    assert len(found["contexts"]) == len(found["clean"]["layers"]) == 2
    used = set(np.array(found["clean"]["layers"][0]["codes"]).tolist())
    assert {int(code) for code in found["contexts"][0]} == used
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", written)


def test_an_image_is_routed_by_patches(image, tmp_path):
    folder, file = image
    (row,) = invoke("--model", folder, file, "--json").output.splitlines()
    found = json.loads(row)
    side = int(len(found["clean"]["source"]) ** 0.5)
    lines = invoke("--model", folder, file, "--by", "code").output.splitlines()
    drawn = [[int(mark) for mark in line.split()] for line in lines if re.fullmatch(r"[\d ]+", line)]
    assert [mark for row in drawn[:side] for mark in row] == found["clean"]["layers"][0]["codes"]
    assert invoke("--model", folder, file, "--html", tmp_path / "page.html").exit_code == 0
    assert "data:image/png;base64," in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], "what is to be routed? name one: FILE or --text"),
        (["--text", "a", "b.txt"], "name one: FILE or --text"),
        (["missing.txt"], "missing.txt: not found"),
        (["--text", "a" * 20_001], "a text of 20,001 characters: at most 20,000"),
        (["--text", "a", "--noise", "swop"], "corruption 'swop' does not exist; there are: swap"),
    ],
)
def test_what_cannot_be_routed_is_one_line(served, arguments, line):
    done = invoke("--model", served(), *arguments)
    assert done.exit_code == (1 if "not found" in line else 2)
    assert line in done.output and len(done.output.splitlines()) == 1


def test_a_text_of_which_nothing_is_left_is_one_line(served, tmp_path):
    folder, file = served(view="text27"), tmp_path / "none.txt"
    file.touch()
    for arguments, line in {
        ("--text", "日本"): "the text: nothing of it is left in the view of this model (text27: letters a-z, and digits spelled "
        "out); give it a letter or a digit",
        (file,): f"{file}: empty; nothing to route",
        ("--text", ""): "the text: empty; nothing to route",
    }.items():
        done = invoke("--model", folder, *arguments)
        assert done.exit_code == 2 and done.output == f"vqmoe: {line}\n"


def test_models_of_texts_and_of_images_are_not_shown_together(served, image):
    folder, file = image
    assert "models of one kind" in invoke("--model", folder, "--model", served(), file).output
    assert "name an image file" in invoke("--model", folder, "--text", "a").output


def test_a_text_is_shown_as_it_is_and_numbers_lie_under_its_cells(served):
    folder = served()
    text = "a :smile: [bold]\t中 \x1b[1mé\r\nend"
    output = invoke("--model", folder, "--text", text).output
    found = json.loads(invoke("--model", folder, "--text", text, "--json").output)
    first, marks, second, ends = output.splitlines()[1:5]
    assert first == "a :smile: [bold]·  中 ·[1m é·" and second == "end" and "\x1b" not in output
    # Byte by byte: the last of a character stands for it, those before it have a cell of their own.
    wanted, place = numbers(found, "clean", 0), 0
    for piece, number in zip(found["clean"]["tokens"], wanted, strict=True):
        if place < cell_len(marks):
            assert int(marks[place]) == number
            place += max(cell_len(piece), 1)
    assert ends == "".join(map(str, wanted[-3:]))


def test_models_are_named_by_what_tells_them_apart(served, tmp_path, monkeypatch):
    assert route.named(["outputs/a/era", "outputs/b/era"]) == ["a/era", "b/era"]
    assert route.named(["a/era", "b/era", "b/other", "b/era"]) == ["a/era", "b/era", "b/other", "b/era"]
    assert route.named(["models:/x@champion", "0123abcd"]) == ["x@champion", "0123abcd"] and route.named([]) == []
    folder = served().rename(tmp_path / "run[bold]7")
    monkeypatch.chdir(folder)
    done = invoke("--model", ".", "--text", "we")
    assert done.exit_code == 0 and done.output.startswith("run[bold]7, block 0")


def test_a_width_of_nothing_is_not_known(served, monkeypatch):
    monkeypatch.setenv("COLUMNS", "0")
    assert invoke("--model", served(), "--text", "we").output.splitlines()[1] == "we"


def test_a_page_in_the_place_of_a_folder_is_one_line(tmp_path):
    for place in (f"{tmp_path}/new/", f"{tmp_path}"):
        done = invoke("--text", "we", "--html", place)
        assert done.exit_code == 2 and done.output.startswith(f"vqmoe: {place}: a folder; name a file for the page")
    assert not (tmp_path / "new").exists()
