import contextlib
import json
import os
import re
from pathlib import Path

import pytest
from ruamel.yaml import YAML
from torchvision.datasets.folder import IMG_EXTENSIONS

from pipeline import config
from pipeline.checking import as_yaml, check, kinds
from pipeline.data.image_sets import SETS
from pipeline.errors import UsageError
from pipeline.moe.layer import SETTINGS
from stages import prepare
from stages.paths import SECTIONS, Paths
from tests.checking.conftest import IMAGES, TEXTS, json_lines, lay, rows
from tests.conftest import REPOSITORY


def prepared(found, root):
    """What `prepare` writes with a preset in which the printed sections have replaced what it has for the same keys."""
    params = YAML(typ="safe").load((REPOSITORY / f"presets/{'vision/digits' if found.preset else 'tiny'}.yaml").read_text())
    for section, keys in YAML(typ="safe").load(as_yaml(found)).items():
        assert keys.keys() <= params[section].keys()
        params[section] |= keys
    (root / "params.yaml").write_text(json.dumps(params))
    loaded = config.load(root / "params.yaml", SETTINGS)
    paths = Paths(root, root / "out")
    prepare.run(loaded.select(SECTIONS["prepare"]), paths)
    return json.loads((paths.data / "manifest.json").read_text())


@pytest.mark.parametrize("form", TEXTS + IMAGES)
def test_prepare_finds_what_was_said(root, form):
    path = lay(root, form)
    found = check(path, root)
    assert found.problem is None
    assert found.path == f"data/{path.name}"
    manifest, splits = prepared(found, root), found.facts["splits"]
    if form in (".txt", ".years.jsonl", "texts"):
        assert manifest["corpus"] == found.path and manifest["tasks"] == {"era": "era"}
        for unit in ("documents", "tokens"):
            assert {split: sizes[unit] for split, sizes in splits.items()} == manifest[unit]
    else:
        unit = "images" if form in IMAGES else "texts"
        assert {split: sizes[unit] for split, sizes in splits.items()} == manifest["examples"]["mine"]
        assert manifest["tasks"] == {"mine": found.path}
        classes = manifest["classes"]["mine"] if form in IMAGES else list(manifest["labels"]["mine"]["train"])
        assert list(found.facts["classes"]) == classes
    assert found.facts["form"].endswith("drawn") is (form not in (".txt", "split classes", "split images", ".npz"))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.csv", "text;label\na;b\n", r"its columns 'text;label' are parted by semicolons; write it with commas, or as \.tsv"),
        ("a.csv", "sentence,class\na,b\n", "no field 'text' among 'sentence', 'class'; rename"),
        ("a.csv", "", "holds no records"),
        (
            "a.csv",
            "text,label\na,x\nb,y\n",
            "splits are drawn, .* of 2 records valid and test got none; add more, or a field 'split'",
        ),
        ("a.jsonl", json_lines({"text": "x", "group": str(i % 2)} for i in range(400)), "of 400 records valid and test got none"),
        ("a.jsonl", json_lines(rows(400, split="train")[:9]), "the valid split is empty"),
        ("a.jsonl", json_lines([*rows(), {"text": "x"}]), "line 401: no field 'label' among 'text'"),
        ("a.jsonl", json_lines({"text": row["text"], "label": "one"} for row in rows()), "the one label 'one'; a task needs"),
        ("a.jsonl", json_lines([*rows(), {"text": " ", "label": "l"}] * 2), "line 401: the text or label is empty, as in 1 more"),
        ("a.txt", "a line", "the test split is empty"),
        ("a.txt", "abcdefgh" * 9, "valid has too little text for a context of 8 bytes"),
        ("a.parquet", b"no Parquet", "truncated or damaged"),
        ("a.json", "[]", r"expected a folder, or a file \.txt, .* write it as \.jsonl"),
        ("a.png", b"", r"expected a folder, .* name the folder that has a folder of images for each class"),
        ("a.md", "text", r"expected a folder, .* rename it if it is one of these"),
        ("a.npz", b"no array", "truncated or damaged"),
    ],
)
def test_what_prepare_would_refuse_is_a_problem_of_one_line(checked, name, content, words):
    found = checked(name, content)
    assert found.params == {} and found.preset is None
    assert found.problem and "\n" not in found.problem
    assert re.search(words, found.problem), found.problem


def test_folders_that_are_no_data(root):
    def problem():
        return check(root / "data/mine", root).problem

    (root / "data/mine").mkdir()
    assert "holds nothing; a folder needs texts (.txt), or a folder of images" in problem()
    (root / "data/mine/a.md").write_text("text")
    assert "holds .md; a folder needs" in problem()
    (root / "data/mine/train.jsonl").write_text("{}")
    assert "a folder of records (.jsonl); put all into one file, with a field split" in problem()
    for i in range(5):
        (root / f"data/mine/{i}.txt").write_text("text")
        (root / f"data/mine/{i}.png").write_bytes(b"")
    assert "holds 5 images and 5 texts; name a folder of the one or the other" in problem()


def test_what_is_no_file_or_folder_is_a_wrong_name(root):
    lay(root, ".csv")
    with pytest.raises(UsageError, match=r"mime\.csv: not found \(did you mean .*/data/mine\.csv\?\)"):
        check(root / "data/mime.csv", root)
    with pytest.raises(UsageError, match=r"q: not found; check the name"):
        check(root / "nowhere/q", root)
    with pytest.raises(UsageError, match=r"a: not found; check the name"):
        check(root / ("a" * 300), root)
    (root / "data/link.txt").symlink_to("gone.txt")
    with pytest.raises(UsageError, match=r"link\.txt: not found \(.*link\.txt is a link to gone\.txt, where nothing is; mend"):
        check(root / "data/link.txt", root)
    os.mkfifo(root / "data/pipe.txt")
    with pytest.raises(UsageError, match=r"pipe\.txt: neither a file nor a folder"):
        check(root / "data/pipe.txt", root)
    with pytest.raises(UsageError, match=r"udcff\.csv: a name that is not UTF-8 cannot stand in params\.yaml; rename it"):
        (root / os.fsdecode(b"\xff.csv")).write_text("text,label\n")
        check(root / os.fsdecode(b"\xff.csv"), root)


def test_links_are_followed_as_prepare_does_and_never_round_and_round(root):
    path = lay(root, "classes")
    (path / "l0/back").symlink_to(path)
    (path / "again").symlink_to(path)
    found = check(path, root)
    assert sum(sizes["texts"] for sizes in found.facts["splits"].values()) == 400
    assert any("is a link to a folder: texts there are not read" in warning for warning in found.warnings)
    path.rename(root / "data/texts")
    path = lay(root, "images")
    (path / "c0/back").symlink_to(path)
    (path / "c1/back").symlink_to(path)
    assert "a link that leads back to a folder it lies in; remove it" in check(path, root).problem


def test_names_that_mean_something_else(root):
    content = json_lines(rows())
    for name, task in (("2020.jsonl", "2020"), ("a b: #c.jsonl", "a-b-c"), ("clean.jsonl", "mine"), ("--.jsonl", "mine")):
        (root / "data" / name).write_text(content)
        found = check(root / "data" / name, root)
        assert found.params["data"]["tasks"] == {task: f"data/{name}"}
        assert prepared(found, root)["tasks"] == {task: f"data/{name}"}
    (root / "digits/a").mkdir(parents=True)
    with contextlib.chdir(root):
        assert check(Path("digits"), root).path == "./digits"


def test_data_that_dvc_does_not_watch_is_warned_of(root):
    (root / "mine.jsonl").write_text(json_lines(rows()))
    assert any("outside of data/" in warning for warning in check(root / "mine.jsonl", root).warnings)
    assert not any("outside" in warning for warning in check(lay(root, ".jsonl"), root).warnings)


def test_fields_without_labels_are_a_corpus_and_said_to_be(checked):
    found = checked("a.jsonl", json_lines({"text": row["text"], "category": row["label"]} for row in rows()))
    assert (found.params["data"]["corpus"], found.params["data"]["tasks"]) == ("data/a.jsonl", {"era": "era"})
    assert any("no field 'label'" in warning and "(category)" in warning for warning in found.warnings)


def test_a_text_beside_folders_makes_them_a_corpus(root):
    path = lay(root, "texts")
    assert any("readme.txt lies beside the folders" in warning for warning in check(path, root).warnings)
    (path / "readme.txt").rename(path / "readme.md")
    found = check(path, root)
    assert list(found.facts["classes"]) == ["part0", "part1", "part2"]
    assert found.facts["left out"] == {".md": 1}


def test_tasks_as_published(root):
    for split in ("train", "test"):
        for label in ("pos", "neg"):
            (root / f"data/imdb/{split}/{label}").mkdir(parents=True)
            for i, row in enumerate(rows(40)):
                (root / f"data/imdb/{split}/{label}/{i}_9.txt").write_text(f"{split} {label} {row['text']}")
    found = check(root / "data/imdb", root)
    assert found.facts["form"] == "folder of a task as published"
    assert list(found.facts["classes"]) == ["negative", "positive"]
    assert prepared(found, root)["examples"]["imdb"] == {"train": 72, "valid": 8, "test": 80}


def test_what_is_an_image_is_what_torchvision_says():
    assert {*IMG_EXTENSIONS} == kinds.IMAGES
    assert kinds.NAMES >= {*SETS}
