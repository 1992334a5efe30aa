import csv
import gzip
import io
import json
import tracemalloc
from collections import Counter

import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from pipeline.data import tables
from pipeline.data.corpora import SPLITS, load_corpus
from pipeline.data.tables import records
from pipeline.data.tasks import load_task
from pipeline.errors import Failure

ROWS = [
    {"text": 'He said "no",\nthen\r\nleft\u2028at once;\tso', "label": "a, b", "split": "train"},
    {"text": "\u00e4", "label": "c", "split": "train"},
    {"text": '"', "label": "c", "split": "valid"},
    {"text": " x ", "label": "a, b", "split": "test"},
]


def write(path, rows):
    if path.suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        end = "\t" if path.suffix == ".tsv" else ","
        cells = [list(rows[0]), *([str(value) for value in row.values()] for row in rows)]
        lines = [end.join('"' + cell.replace('"', '""') + '"' for cell in row) for row in cells]
        path.write_text("\n".join(lines), newline="")
    return path


@pytest.mark.parametrize("kind", tables.READERS)
def test_the_same_records_in_every_form(tmp_path, kind):
    found = list(records(write(tmp_path / f"t{kind}", ROWS), ("text", "label")))
    assert [record for _, record in found] == ROWS
    if kind != ".parquet":
        (tmp_path / f"t{kind}.gz").write_bytes(gzip.compress((tmp_path / f"t{kind}").read_bytes()))
        assert list(records(tmp_path / f"t{kind}.gz", ("text", "label"))) == found
    task = load_task(f"t{kind}", {}, tmp_path, 0)
    assert task.labels == ("a, b", "c")
    corpus = load_corpus(f"t{kind}", tmp_path)
    assert [document.text for document in corpus["train"]] == [ROWS[0]["text"], "\u00e4"]
    for split in SPLITS:
        assert [document.text for document in corpus[split]] == [example.text for example in task.splits[split]]


@pytest.mark.parametrize("kind", tables.READERS)
def test_records_without_a_split_are_given_one_by_what_they_hold(tmp_path, kind):
    rows = [{"text": f"text {i % 1000}", "label": str(i % 2)} for i in range(2000)]
    found = [record for _, record in records(write(tmp_path / f"t{kind}", rows), ("text", "label"))]
    assert [(record["text"], record["label"]) for record in found] == [(row["text"], row["label"]) for row in rows]
    sizes = Counter(record["split"] for record in found)
    assert 1740 < sizes["train"] < 1860 and 60 < sizes["valid"] < 140 and 60 < sizes["test"] < 140
    # Equal texts, and those of a group, are in one split, wherever they stand.
    assert len({(record["text"], record["split"]) for record in found}) == 1000
    fewer = [record for _, record in records(write(tmp_path / f"u{kind}", rows[1500:]), ("text", "label"))]
    assert fewer == found[1500:]
    grouped = [row | {"group": f"d{i % 10}"} for i, row in enumerate(rows)]
    found = [record for _, record in records(write(tmp_path / f"v{kind}", grouped), ("text", "label"))]
    assert len({(record["group"], record["split"]) for record in found}) == 10


@pytest.mark.parametrize(
    ("kind", "rows", "words"),
    [
        (".jsonl", [{"text": "a"}, {"text": "b", "split": "test"}], "line 2: has a split, and the first has none"),
        (".jsonl", [{"text": "a", "split": "test"}, {"text": "b"}], "line 2: no field 'split' among 'text'"),
        (".parquet", [{"text": "a", "split": "dev"}], "row 1: split is 'dev'; expected train, valid, test"),
        (".parquet", [{"words": "a", "label": 1}], "row 1: no field 'text' among 'words', 'label'"),
        (".parquet", [{"text": b"a"}], "row 1: text is b'a', expected text"),
        (".parquet", [{"text": "a", "split": "test"}, {"text": None, "split": "test"}], "row 2: no field 'text' among 'split'"),
        (".tsv", [{"text": "a", "split": "dev"}], "line 2: split is 'dev'"),
    ],
)
def test_records_that_are_refused(tmp_path, kind, rows, words):
    with pytest.raises(Failure, match=f"t{kind}, {words}"):
        list(records(write(tmp_path / f"t{kind}", rows), ("text",)))


def test_parquet_that_is_none_or_cut_off(tmp_path):
    path = write(tmp_path / "t.parquet", ROWS)
    for content in (b"", b"no Parquet at all", path.read_bytes()[:-20]):
        path.write_bytes(content)
        with pytest.raises(Failure, match=r"t\.parquet: truncated or damaged .*fetch it again"):
            list(records(path, ("text",)))


CELLS = st.lists(st.text('ab",;\r\n\t \u2028', min_size=1), min_size=2, max_size=2)


@given(st.lists(CELLS, min_size=1, max_size=4), st.sampled_from(["\n", "\r\n", "\r"]))
def test_csv_is_read_line_by_line_as_it_would_be_whole(tmp_path_factory, cells, end):
    path, file = tmp_path_factory.getbasetemp() / "t.csv", io.StringIO(newline="")
    csv.writer(file, lineterminator=end, quoting=csv.QUOTE_ALL).writerows([["text", "label"], *cells])
    path.write_text(file.getvalue(), newline="")
    found = [record for _, record in tables.raw(path)]
    assert found == list(csv.DictReader(io.StringIO(file.getvalue(), newline=""), strict=True))
    assert found == [dict(zip(("text", "label"), row, strict=True)) for row in cells]


@pytest.mark.parametrize("kind", tables.READERS)
def test_a_large_file_is_not_in_memory_as_a_whole(tmp_path, kind):
    path = write(tmp_path / f"t{kind}", [{"text": f"{i} " * 2000} for i in range(2000)])
    assert sum(1 for _ in records(path, ("text",))) == 2000
    tracemalloc.start()
    for _ in records(path, ("text",)):
        pass
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8 << 20
