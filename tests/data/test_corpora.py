import gzip
import json
import lzma
import os
import random
import re
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data import archives, corpora
from pipeline.data.archives import encoded
from pipeline.data.corpora import PUBLISHED, SPLITS, Document, join, load_corpus, stream, view
from pipeline.errors import Failure, UsageError
from tests.conftest import REPOSITORY
from tests.data.server import HELD_OUT, TRAINING, billion, wikitext, zipped


def text(documents, view="bytes"):
    return "".join(stream(documents, view))


def documents(corpus):
    return {split: list(corpus[split]) for split in SPLITS}


def test_27_symbol_view():
    assert view("In 1789, Mr. O'Neil -- paid $20!", "text27") == "in one seven eight nine mr o neil paid two zero"
    assert view("Ünïcode  x", "text27") == "n code x"
    assert view("As it Is.\n", "bytes") == "As it Is.\n"
    assert join(["A.", "B."], "text27") == "a b"
    assert join(["A.", "B."], "bytes") == "A.\nB."


SPELLED = dict(zip("0123456789", "zero one two three four five six seven eight nine".split(), strict=True))


@given(st.text() | st.text("aB 1.\n\u00e4\u0130\udc80\x00\x85\u2028\u212a"))
def test_27_symbol_view_is_that_of_the_simplest_code(content):
    spelled = "".join(f" {SPELLED[c]} " if c in SPELLED else c for c in content.lower())
    assert view(content, "text27") == re.sub("[^a-z]+", " ", spelled).strip()


def test_the_embedded_corpus_is_split_by_whole_address():
    corpus = documents(load_corpus("sotu", REPOSITORY))
    assert {split: len(corpus[split]) for split in SPLITS} == {"train": 193, "valid": 20, "test": 20}
    names = [document.name for split in SPLITS for document in corpus[split]]
    assert len(set(names)) == len(names) == 233
    assert all(1790 <= document.year <= 2021 for split in SPLITS for document in corpus[split])
    assert len(text(corpus["test"], "text27")) == 749_197


def test_a_text_file_is_cut_90_5_5(tmp_path):
    content = "\u00e4" * 901 + "y" * 50 + "z" * 50
    (tmp_path / "a.TXT").write_text(content)
    (tmp_path / "a.txt.xz").write_bytes(lzma.compress(content.encode()))
    (tmp_path / "a.txt.GZ").write_bytes(gzip.compress(content.encode()))
    for name in ("a.TXT", "a.txt.xz", "a.txt.GZ"):
        corpus = load_corpus(name, tmp_path)
        assert [text(corpus[split]) for split in SPLITS] == ["\u00e4" * 901, "y" * 50, "z" * 50]
        assert [len(list(corpus[split])) for split in SPLITS] == [1, 1, 1]


def test_a_folder_and_json_lines(tmp_path, corpus_folder):
    folder = load_corpus(str(corpus_folder), tmp_path)
    assert [text(folder[split]) for split in SPLITS] == [(corpus_folder / f"{split}.txt").read_text() for split in SPLITS]
    lines = [{"id": f"d{i}", "text": f"text {i}", "split": split, "year": 1800} for i, split in enumerate(SPLITS)]
    path = tmp_path / "c.jsonl.xz"
    path.write_bytes(lzma.compress("\n".join(map(json.dumps, lines)).encode()))
    corpus = load_corpus("c.jsonl.xz", tmp_path)
    assert list(corpus["test"]) == list(corpus["test"]) == [Document("d2", "text 2", 1800)]
    assert corpus["test"].size == 6


def test_separators_inside_a_text_do_not_end_a_line_and_a_byte_order_mark_is_no_text(tmp_path):
    content = "one\u2028two\x85three"
    lines = [json.dumps({"text": content, "split": split}, ensure_ascii=False) for split in SPLITS]
    (tmp_path / "c.jsonl").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    assert text(load_corpus("c.jsonl", tmp_path)["valid"]) == content


def _lines(*records):
    return "\n".join(record if isinstance(record, str) else json.dumps(record) for record in records).encode()


GOOD = [{"text": "a", "split": split} for split in SPLITS]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("c.jsonl", _lines(*GOOD, '{"text": "trunc'), r"c\.jsonl, line 4: not JSON"),
        ("c.jsonl", _lines(*GOOD, {"split": "train"}), r"line 4: no field 'text'"),
        ("c.jsonl", _lines(*GOOD, {"text": None, "split": "train"}), r"line 4: no field 'text'"),
        ("c.jsonl", _lines(*GOOD, {"text": 5, "split": "train"}), r"line 4: text is 5"),
        ("c.jsonl", _lines(*GOOD, {"text": "a", "split": "dev"}), r"line 4: split is 'dev'; expected train, valid, test"),
        ("c.jsonl", _lines(*GOOD, [1]), r"line 4: holds list"),
        ("c.jsonl", _lines(*GOOD, "[" * 100_000), r"line 4: not JSON"),
        ("c.jsonl", _lines(*GOOD, {"text": "a \ud83d b", "split": "test"}), r"line 4: text holds half of a surrogate pair"),
        ("c.jsonl", _lines(*GOOD[:2]), r"the test split is empty"),
        ("c.jsonl", b"\xff\xfe", r"not UTF-8 at byte 0; convert"),
        ("c.jsonl.xz", lzma.compress(_lines(*GOOD))[:-20], r"truncated or damaged"),
        ("c.jsonl.xz", b"no archive", r"truncated or damaged"),
        ("c.jsonl.gz", gzip.compress(_lines(*GOOD), mtime=0)[:-20], r"truncated or damaged"),
        ("c.jsonl.gz", b"no archive", r"truncated or damaged"),
        ("c.txt", b"", r"the train split is empty"),
        ("c.txt", b"ok" * 50 + b"\xe9", r"not UTF-8 at byte 100"),
        ("c.txt", b"ok\n" * 500_000 + b"\xe9", r"not UTF-8 at byte 1500000"),
    ],
)
def test_bad_files_are_one_line(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(Failure, match=words) as caught:
        load_corpus(name, tmp_path)
    assert "\n" not in str(caught.value)
    assert name in str(caught.value)


def test_names_that_lead_nowhere(tmp_path):
    with pytest.raises(
        UsageError, match=r"'sotuu': neither a corpus by name \(sotu, .*, lm1b\) nor an existing path \(did you mean sotu\?\)"
    ):
        load_corpus("sotuu", tmp_path)
    with pytest.raises(UsageError, match="nor an existing path"):
        load_corpus("x" * 300, tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/letters").mkdir()
    with pytest.raises(UsageError, match=r"^data\.shifts\.other has 'mine/leters': .* \(did you mean mine/letters\?\)$"):
        load_corpus("mine/leters", tmp_path, "data.shifts.other")
    (tmp_path / "c.md").write_text("text")
    with pytest.raises(UsageError, match=r"expected a folder, or a file \.txt, \.jsonl, \.csv or \.tsv"):
        load_corpus("c.md", tmp_path)
    with pytest.raises(Failure, match=r"sotu\.jsonl\.xz: not found; restore"):
        load_corpus("sotu", tmp_path)
    (tmp_path / "folder").mkdir()
    with pytest.raises(
        Failure, match=r"folder: holds 0 \.txt files; a folder of texts needs train\.txt, valid\.txt, test\.txt, or"
    ):
        load_corpus("folder", tmp_path)
    (tmp_path / "folder/train.txt").write_text("text")
    with pytest.raises(Failure, match=r"valid\.txt: not found; a folder of texts needs"):
        load_corpus("folder", tmp_path)


def test_a_folder_of_texts_is_split_by_file(tmp_path):
    names = {f"{i % 7}/{i}.txt" for i in range(100)}
    for name in names:
        (tmp_path / "c" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "c" / name).write_text(f"text of {name}\n")
    (tmp_path / "c/readme.md").write_text("no text")
    found = documents(load_corpus("c", tmp_path))
    assert [len(found[split]) for split in SPLITS] == [90, 5, 5]
    assert {document.name for split in SPLITS for document in found[split]} == names
    assert all([d.name for d in found[split]] == sorted(d.name for d in found[split]) for split in SPLITS)
    assert text(found["test"]) == "".join(f"text of {document.name}\n" for document in found["test"])
    # Held-out files are not the last ones, or all of one folder, and only names decide which they are.
    assert len({document.name.split("/")[0] for document in (*found["valid"], *found["test"])}) > 3
    (tmp_path / "c").rename(tmp_path / "d")
    assert documents(load_corpus("d", tmp_path)) == found
    for name in sorted(names)[3:]:
        (tmp_path / "d" / name).unlink()
    assert [len(list(split)) for split in load_corpus("d", tmp_path).values()] == [1, 1, 1]
    (tmp_path / "d" / min(names)).unlink()
    with pytest.raises(Failure, match=r"d: holds 2 \.txt files"):
        load_corpus("d", tmp_path)


def test_a_name_that_is_not_utf_8_is_named(tmp_path):
    for name in (b"a", b"b", b"c\xff"):
        (tmp_path / os.fsdecode(name + b".txt")).write_text("text")
    with pytest.raises(Failure, match=r"c\\udcff\.txt: its name is not UTF-8; rename it"):
        load_corpus(str(tmp_path), tmp_path)


def test_splits_that_are_folders(tmp_path):
    def lay(name):
        (tmp_path / "c" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "c" / name).write_text(f"text of {name}\n")

    def names():
        return {split: {document.name for document in found} for split, found in documents(load_corpus("c", tmp_path)).items()}

    for i in range(40):
        lay(f"train/{'ab'[i % 2]}/{i}.txt")
    lay("test/a/0.txt")
    lay("readme.txt")
    found = names()
    assert found["test"] == {"test/a/0.txt"}
    assert len(found["valid"]) == 2 and len(found["train"]) == 38
    assert all(name.startswith("train/") for name in found["valid"] | found["train"])
    lay("val/b/1.txt")
    assert names() == {"train": found["train"] | found["valid"], "valid": {"val/b/1.txt"}, "test": found["test"]}
    (tmp_path / "c/test/a/0.txt").unlink()
    assert names()["test"] == {"val/b/1.txt"}


TEXTS = st.lists(st.tuples(st.text("aB 1.\n\u00e4\u0130", max_size=8), st.booleans()), max_size=8)


@given(TEXTS)
def test_a_stream_is_the_view_of_the_whole(parts):
    # Each text begins a document or goes on with the one before.
    given, whole, last = [], "", "\n"
    for part, (content, begins) in enumerate(parts):
        given.append(Document("d", content, part=0 if begins else part + 1))
        whole += ("\n" if begins and last != "\n" else "") + content
        last = content[-1:] or last
    assert text(given) == whole
    letters = view(whole, "text27")
    ends = [" " if letters and end == " " else "" for end in (whole[:1], whole[-1:])]
    assert text(given, "text27") == ends[0] + letters + ends[1]


def test_the_published_ones_are_pinned():
    assert list(PUBLISHED) == ["enwik8", "text8", "wikitext-103", "lm1b"]
    assert all(re.fullmatch("[0-9a-f]{64}", entry.sha256) for entry in PUBLISHED.values())
    assert corpora._cuts(100_000_000) == [
        ("train", 0, 90_000_000),
        ("valid", 90_000_000, 95_000_000),
        ("test", 95_000_000, 100_000_000),
    ]


def test_enwik8_is_cut_at_bytes_and_keeps_every_one(publish, server, tmp_path):
    # A letter of three bytes lies across the first border, one of two bytes across the second.
    content = (b"<page>\n" * 300)[:1799] + "\u6f22".encode() + b"x" * 97 + "\u00e4".encode() + b"y" * 99
    assert len(content) == 2000
    publish("enwik8", zipped({"enwik8": content}))
    corpus = load_corpus("enwik8", tmp_path)
    assert [encoded(text(corpus[split])) for split in SPLITS] == [content[:1800], content[1800:1900], content[1900:]]
    assert [corpus[split].size for split in SPLITS] == [1800, 100, 100]
    assert text(corpus["valid"], "text27") == "x" * 97
    assert (tmp_path / "data/archives/enwik8.zip").read_bytes() == server.files["enwik8.zip"]
    # Reads what is there, without the server.
    server.files.clear()
    assert encoded(text(load_corpus("enwik8", tmp_path)["test"])) == content[1900:]


@pytest.mark.parametrize("content", [" abc" * 600_000, "abc " * 600_000])
def test_text8_is_used_as_it_is_in_either_view(publish, tmp_path, content):
    # Splits begin, or end, with a blank.
    publish("text8", zipped({"text8": content}))
    corpus = load_corpus("text8", tmp_path)
    first, second = len(content) * 90 // 100, len(content) * 95 // 100
    for name in ("bytes", "text27"):
        assert [text(corpus[split], name) for split in SPLITS] == [content[:first], content[first:second], content[second:]]
    # In stretches of whole words, though there is no line end.
    stretches = [document.text for document in corpus["train"]]
    assert len(stretches) > 2
    assert all(stretch.endswith(" ") and len(stretch) < 2 * archives.MIB for stretch in stretches[:-1])


def test_wikitext_is_read_as_published(publish, tmp_path):
    contents = {split: f" \n = {split} = \n \n a <unk> of 1 @,@ 000 \u2013 @-@ \n" for split in SPLITS}
    publish("wikitext-103", wikitext(contents))
    corpus = load_corpus("wikitext-103", tmp_path)
    assert {split: text(corpus[split]) for split in SPLITS} == contents


def test_one_billion_words_has_99_shards_and_two_that_are_held_out(publish, tmp_path):
    order = random.Random(0).sample([*TRAINING, *HELD_OUT], 149)
    shards = {name: f"A sentence of {name} .\nAnother one .\n".encode() for name in order}
    publish("lm1b", billion(shards))
    corpus = load_corpus("lm1b", tmp_path)
    assert text(corpus["train"]).encode() == b"".join(shards[name] for name in order if name in TRAINING)
    assert text(corpus["valid"]).encode() == shards[HELD_OUT[0]]
    assert text(corpus["test"]).encode() == shards[HELD_OUT[1]]
    assert corpus["train"].size == sum(len(shards[name]) for name in TRAINING)
    del shards[TRAINING[41]]
    (tmp_path / "data/archives/1-billion-word-language-modeling-benchmark-r13output.tar.gz").unlink()
    publish("lm1b", billion(shards))
    with pytest.raises(Failure, match=r"r13output\.tar\.gz: has no file .*/news\.en-00042-of-00100"):
        load_corpus("lm1b", tmp_path)


def test_one_billion_words_never_is_in_memory(publish, tmp_path):
    sentences = b"The quick brown fox jumps over the lazy dog .\n" * 8_000
    publish("lm1b", billion(dict.fromkeys([*TRAINING, *HELD_OUT[:2]], sentences)))
    tracemalloc.start()
    try:
        split = load_corpus("lm1b", tmp_path)["train"]
        size = sum(len(stretch) for stretch in stream(split, "bytes"))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert size == split.size == 99 * len(sentences) > 35_000_000
    assert peak < 12_000_000
