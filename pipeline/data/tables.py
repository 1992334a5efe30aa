"""Files of records, read as they are needed: JSON lines, CSV, TSV and Parquet; and the splits of records that have none."""

import csv
import gzip
import hashlib
import io
import json
import lzma
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.data import archives
from pipeline.errors import Failure

SPLITS = ("train", "valid", "test")
# What has no split of its own: 90 %, 5 %, 5 %, in that order.
CUTS = (0.90, 0.95)
# What is read of a record; other fields may be there.
KNOWN = ("text", "label", "split", "group", "id", "year")
# Of a file of text or of records, but Parquet, which compresses by itself.
COMPRESSED = {".gz": gzip.open, ".xz": lzma.open}

# A text may be longer than the 131,072 characters that csv allows a field by default.
csv.field_size_limit(2**31 - 1)


def file_kind(path: Path) -> str:
    """The suffix in lower case, without that of compression."""
    return (path.with_suffix("") if path.suffix.lower() in COMPRESSED else path).suffix.lower()


def chunks(path: Path) -> Iterator[bytes]:
    """Bytes of a file, plain or compressed."""
    opened = COMPRESSED.get(path.suffix.lower(), open)
    with archives.reading(path), opened(path, "rb") as file:
        while chunk := file.read(archives.MIB):
            yield chunk


def texts(path: Path) -> Iterator[str]:
    """Text of a UTF-8 file, plain or compressed, in stretches."""
    return archives.decoded(chunks(path), str(path))


def records(path: Path, fields: Sequence[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Numbered records of a file, each with the named fields as text and a split.

    Where the first has no split, none may have, and each goes where the sha256 decides of what it was taken from, its group, or
    else of its text: what is alike is in one split, and stays there when the file grows.
    """
    drawn = None
    for number, record in raw(path):
        where = place(path, number)
        drawn = "split" not in record if drawn is None else drawn
        _check(where, record, fields if drawn else (*fields, "split"))
        if drawn:
            if record.get("split") is not None:
                raise Failure(f"{where}: has a split, and the first has none; give one to all of them, or to none")
            record = record | {"split": draw(group(record) or record["text"])}
        elif record["split"] not in SPLITS:
            raise Failure(f"{where}: split is '{record['split']}'; expected {', '.join(SPLITS)}")
        yield number, record


def raw(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Numbered records of a file as they are."""
    return READERS[file_kind(path)](path)


def place(path: Path, number: int) -> str:
    """Where a record is, for an error."""
    return f"{path}, {'row' if file_kind(path) == '.parquet' else 'line'} {number}"


def group(record: Mapping[str, Any]) -> str | None:
    """What a record was taken from, if it says so."""
    given = record.get("group")
    return None if given in (None, "") else str(given)


def draw(name: str) -> str:
    """A split, by a name alone."""
    share = int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()[:8]) / 2**64
    return "train" if share < CUTS[0] else "valid" if share < CUTS[1] else "test"


def _json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(archives.lines(texts(path)), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            raise Failure(f"{path}, line {number}: not JSON; the file may be truncated, fetch or write it again") from None
        if not isinstance(record, dict):
            raise Failure(f"{path}, line {number}: holds {type(record).__name__}, expected an object with text")
        yield number, record


def _csv(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    # newline="": a line ends where csv says, which a carriage return may, too.
    lines = (part for line in archives.lines(texts(path)) for part in io.StringIO(f"{line}\n", newline=""))
    reader = csv.DictReader(lines, strict=True, delimiter="\t" if file_kind(path) == ".tsv" else ",")
    try:
        for record in reader:
            yield reader.line_num, record
    except csv.Error as error:
        raise Failure(f"{path}, line {reader.line_num}: no valid CSV ({error}); check its quotes, or use .jsonl") from None


def _parquet(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    # Loading it takes a quarter of a second, which others need not wait for.
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        with archives.reading(path), parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            for batch in file.iter_batches(256, columns=[name for name in names if name in KNOWN] if "text" in names else names):
                for record in batch.to_pylist():
                    number += 1
                    yield number, record
    except pyarrow.ArrowException as error:
        raise Failure(f"{path}: cannot be read as Parquet ({str(error).partition(chr(10))[0]}); write it again") from None


READERS = {".jsonl": _json_lines, ".csv": _csv, ".tsv": _csv, ".parquet": _parquet}
FILES = ".jsonl, .csv or .tsv (or these with .gz or .xz) or .parquet"


def _check(where: str, record: Mapping[str, Any], fields: Sequence[str]) -> None:
    """Whether every field is there as text; a label may be a whole number."""
    for field in fields:
        if field not in record or record[field] is None:
            there = ", ".join(f"'{name}'" for name, value in record.items() if name and value is not None)
            raise Failure(f"{where}: no field '{field}' among {there}; every line needs {', '.join(fields)}")
        if not isinstance(record[field], str) and not (field == "label" and isinstance(record[field], int)):
            raise Failure(f"{where}: {field} is {record[field]!r}, expected text")
        if re.search("[\ud800-\udfff]", str(record[field])):
            raise Failure(f"{where}: {field} holds half of a surrogate pair (\\ud800 to \\udfff); write the character itself")
