import json
import lzma

import pytest

from pipeline.data.corpora import SPLITS, Document, join, load_corpus, streams, view
from pipeline.errors import Failure, UsageError
from tests.conftest import REPOSITORY


def test_27_symbol_view():
    assert view("In 1789, Mr. O'Neil -- paid $20!", "text27") == "in one seven eight nine mr o neil paid two zero"
    assert view("Ünïcode  x", "text27") == "n code x"
    assert view("As it Is.\n", "bytes") == "As it Is.\n"
    assert join(["A.", "B."], "text27") == "a b"
    assert join(["A.", "B."], "bytes") == "A.\nB."


def test_the_embedded_corpus_is_split_by_whole_address():
    corpus = load_corpus("sotu", REPOSITORY)
    assert {split: len(corpus[split]) for split in SPLITS} == {"train": 193, "valid": 20, "test": 20}
    names = [document.name for split in SPLITS for document in corpus[split]]
    assert len(set(names)) == len(names) == 233
    assert all(1790 <= document.year <= 2021 for split in SPLITS for document in corpus[split])
    assert len(join([document.text for document in corpus["test"]], "text27")) == 749_197


def test_a_text_file_is_cut_90_5_5(tmp_path):
    text = "x" * 900 + "y" * 50 + "z" * 50
    (tmp_path / "a.TXT").write_text(text)
    (tmp_path / "a.txt.xz").write_bytes(lzma.compress(text.encode()))
    for name in ("a.TXT", "a.txt.xz"):
        corpus = load_corpus(name, tmp_path)
        assert [set(corpus[split][0].text) for split in SPLITS] == [{"x"}, {"y"}, {"z"}]


def test_a_folder_and_json_lines(tmp_path, corpus_folder):
    assert load_corpus(str(corpus_folder), tmp_path)["valid"][0].text.endswith(".")
    lines = [{"id": f"d{i}", "text": f"text {i}", "split": split, "year": 1800} for i, split in enumerate(SPLITS)]
    path = tmp_path / "c.jsonl.xz"
    path.write_bytes(lzma.compress("\n".join(map(json.dumps, lines)).encode()))
    corpus = load_corpus("c.jsonl.xz", tmp_path)
    assert corpus["test"][0].name == "d2"
    assert corpus["test"][0].year == 1800


def test_separators_inside_a_text_do_not_end_a_line_and_a_byte_order_mark_is_no_text(tmp_path):
    text = "one\u2028two\x85three"
    lines = [json.dumps({"text": text, "split": split}, ensure_ascii=False) for split in SPLITS]
    (tmp_path / "c.jsonl").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    assert load_corpus("c.jsonl", tmp_path)["valid"][0].text == text


def test_a_view_that_leaves_nothing_is_named():
    corpus = {split: [Document(split, "abc" if split == "train" else "\u6f22\u5b57")] for split in SPLITS}
    assert streams(corpus, "bytes")["test"] == "\u6f22\u5b57"
    with pytest.raises(Failure, match=r"data\.view text27 leaves nothing of the valid split.*use data\.view: bytes"):
        streams(corpus, "text27")


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
        ("c.txt", b"", r"the train split is empty"),
        ("c.txt", b"ok" * 50 + b"\xe9", r"not UTF-8 at byte 100"),
    ],
)
def test_bad_files_are_one_line(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(Failure, match=words) as caught:
        load_corpus(name, tmp_path)
    assert "\n" not in str(caught.value)
    assert name in str(caught.value)


def test_names_that_lead_nowhere(tmp_path):
    with pytest.raises(UsageError, match=r"data\.corpus is 'sotuu': neither an embedded corpus \(sotu\) nor an existing path"):
        load_corpus("sotuu", tmp_path)
    with pytest.raises(UsageError, match="nor an existing path"):
        load_corpus("x" * 300, tmp_path)
    (tmp_path / "c.csv").write_text("text,split")
    with pytest.raises(UsageError, match=r"expected a folder, or a file \.txt or \.jsonl"):
        load_corpus("c.csv", tmp_path)
    with pytest.raises(Failure, match=r"sotu\.jsonl\.xz: not found; restore"):
        load_corpus("sotu", tmp_path)
    (tmp_path / "folder").mkdir()
    with pytest.raises(Failure, match=r"train\.txt: not found; a corpus folder needs"):
        load_corpus("folder", tmp_path)
