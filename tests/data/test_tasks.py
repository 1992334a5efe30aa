import bz2
import gzip
import lzma

import pytest

from pipeline.data.corpora import SPLITS, Document, load_corpus
from pipeline.data.tasks import groups, load_task, passages, read_task, write_task
from pipeline.errors import Failure, UsageError
from tests.conftest import REPOSITORY


def test_passages_are_whole_sentences_and_lose_nothing():
    text = " ".join(f"Sentence number {i} is here." for i in range(40)) + " " + "word " * 100 + "end. Short."
    parts = passages(text, 120)
    assert " ".join(parts).split() == text.split()
    assert all(120 <= len(part) <= 3 * 120 for part in parts[:-1])
    assert 30 <= len(parts[-1]) <= 3 * 120
    assert parts[0].endswith(".")
    assert passages("Tiny.", 120) == ["Tiny."]
    assert passages("x" * 500, 100) == ["x" * 200, "x" * 200, "x" * 100]


def test_the_era_task_keeps_splits_apart():
    corpus = load_corpus("sotu", REPOSITORY)
    task = load_task("era", corpus, REPOSITORY, 480)
    assert task.labels == ("1790-1829", "1830-1869", "1870-1909", "1910-1949", "1950-1989", "1990-2029")
    assert all({example.label for example in task.splits[split]} == set(task.labels) for split in ("train", "test"))
    texts = {split: {example.text for example in task.splits[split]} for split in SPLITS}
    assert len(texts["train"] & texts["test"]) <= 1
    assert sum(len(task.splits[split]) for split in SPLITS) > 15_000
    assert load_task("era", {split: [Document("d", "without a year")] for split in SPLITS}, REPOSITORY, 480) == task


def test_round_trip(tmp_path, task_file):
    with task_file.open("a") as file:
        file.write("one\u2028two,first,train\n" + "x" * 200_000 + ",first,train\n")
    task = load_task(str(task_file), {}, tmp_path, 0)
    assert task.labels == ("first", "second")
    write_task(tmp_path / "task", task)
    assert read_task(tmp_path / "task") == task


def test_what_a_text_was_taken_from_is_numbered_or_unknown(tmp_path):
    lines = [f"{name},{label},{split},doc-{name}" for split in SPLITS for name, label in (("b", 0), ("a", 1), ("b", 1))]
    (tmp_path / "t.csv").write_text("\n".join(["text,label,split,group", *lines, "c,1,train,"]))
    task = load_task("t.csv", {}, tmp_path, 0)
    assert [example.group for example in task.splits["train"]] == ["doc-b", "doc-a", "doc-b", None]
    assert groups(task.splits["test"])["groups"].tolist() == [1, 0, 1]
    assert groups(task.splits["train"]) == {}
    write_task(tmp_path / "task", task)
    assert read_task(tmp_path / "task") == task


def test_the_passages_of_an_address_are_a_group():
    task = load_task("era", load_corpus("sotu", REPOSITORY), REPOSITORY, 480)
    assert [int(groups(task.splits[split])["groups"].max()) + 1 for split in SPLITS] == [193, 20, 20]


def test_json_lines_with_integer_labels_plain_or_compressed(tmp_path):
    text = "".join(f'{{"text": "a, \\"b\\"", "label": {label}, "split": "{split}"}}\n' for split in SPLITS for label in (0, 1))
    (tmp_path / "t.jsonl").write_text(text)
    (tmp_path / "t.jsonl.xz").write_bytes(lzma.compress(text.encode()))
    (tmp_path / "t.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    task = load_task("t.jsonl", {}, tmp_path, 0)
    assert task.labels == ("0", "1")
    assert load_task("t.jsonl.xz", {}, tmp_path, 0) == load_task("t.jsonl.gz", {}, tmp_path, 0) == task


def test_a_folder_of_texts_for_each_class(tmp_path):
    for i in range(100):
        path = tmp_path / f"t/{'one' if i % 3 else 'deep/two'}/{i}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"\ufefftext {i}\n")
    (tmp_path / "t/notes.md").write_text("no text")
    task, corpus = load_task("t", {}, tmp_path, 0), load_corpus("t", tmp_path)
    assert task.labels == ("one", "two")
    assert [len(task.splits[split]) for split in SPLITS] == [90, 5, 5]
    for split in SPLITS:
        # The language model learns on no text that the task is tested on.
        assert {example.text for example in task.splits[split]} == {document.text for document in corpus[split]}
        assert all(example.label == ("one" if int(example.text.split()[1]) % 3 else "two") for example in task.splits[split])
    (tmp_path / "t/readme.txt").write_text("text")
    with pytest.raises(Failure, match=r"t/readme\.txt: lies in no folder of a class; put it into one"):
        load_task("t", {}, tmp_path, 0)


def test_a_folder_of_texts_with_splits(tmp_path):
    for split in SPLITS:
        for label in "ab":
            (tmp_path / "t" / split / label).mkdir(parents=True)
            (tmp_path / "t" / split / label / "1.txt").write_text(f"{label} of {split}")
    task = load_task("t", {}, tmp_path, 0)
    assert {split: [(e.text, e.label) for e in task.splits[split]] for split in SPLITS} == {
        split: [(f"{label} of {split}", label) for label in "ab"] for split in SPLITS
    }
    (tmp_path / "t/test/b").rename(tmp_path / "t/test/c")
    with pytest.raises(Failure, match=r"t/test/c/1\.txt: label 'c' is in test but never in train"):
        load_task("t", {}, tmp_path, 0)


HEAD = "text,label,split\na,x,train\nb,y,train\nc,x,valid\n"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (HEAD + "d,z,test\n", r"line 5: label 'z' is in test but never in train"),
        (HEAD, "the test split is empty"),
        (HEAD + " ,x,test\n", "line 5: the text is empty"),
        (HEAD + "d,x\n", "line 5: no field 'split' among 'text', 'label'"),
        (HEAD + "d, ,test\n", "line 5: the label is empty"),
        ("text;label;split\na;x;train\n", "line 2: no field 'text' among 'text;label;split'"),
        (HEAD + "d,x,dev\n", "line 5: split is 'dev'"),
        (HEAD + '"d,x,test\n', "line 4: no valid CSV"),
        ("text,split\na,train\n", "line 2: no field 'label'"),
        ("text,label,split\na,x,train\nc,x,valid\nd,x,test\n", "one label 'x'"),
        ("", "the train split is empty"),
    ],
)
def test_bad_tasks_are_one_line(tmp_path, content, words):
    (tmp_path / "t.csv").write_text(content)
    with pytest.raises(Failure, match=words) as caught:
        load_task("t.csv", {}, tmp_path, 0)
    assert "\n" not in str(caught.value)
    assert "t.csv" in str(caught.value)


def test_names_and_corpora_that_do_not_fit(tmp_path):
    with pytest.raises(
        UsageError, match=r"data\.tasks has 'eras': neither era, sst2, .*, banking77 nor an existing path \(did you mean era\?\)"
    ):
        load_task("eras", {}, tmp_path, 0)
    with pytest.raises(UsageError, match="documents with a year and without"):
        load_task("era", {split: [Document("d", "text", 1800), Document("d", "text")] for split in SPLITS}, tmp_path, 100)
    for name, content in (
        ("t.txt", b"a b c"),
        ("t.json", b"[]"),
        ("t.csv.bz2", bz2.compress(HEAD.encode())),
        ("t.gz", gzip.compress(HEAD.encode())),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UsageError, match=rf"data\.tasks has '{name}': expected a file \.jsonl, \.csv or \.tsv \(or"):
            load_task(name, {}, tmp_path, 0)
    (tmp_path / "t.tar.gz").write_bytes(b"no archive")
    with pytest.raises(Failure, match=r"t\.tar\.gz: truncated or damaged"):
        load_task("t.tar.gz", {}, tmp_path, 0)
    with pytest.raises(Failure, match="run `vqmoe prepare` again"):
        read_task(tmp_path / "task")
