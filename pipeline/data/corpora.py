"""Corpora as lists of documents per split, and the two views of a text."""

import json
import lzma
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import Failure, UsageError

SPLITS = ("train", "valid", "test")
EMBEDDED = {"sotu": "data/sotu.jsonl.xz"}
# A single text file is split in its own order, as enwik8 and text8 are: 90 %, 5 %, 5 % of its characters.
TEXT_SPLIT = (0.90, 0.95)

_DIGITS = dict(zip("0123456789", "zero one two three four five six seven eight nine".split(), strict=True))
_SPELLED = str.maketrans({digit: f" {word} " for digit, word in _DIGITS.items()})
_OTHER = re.compile("[^a-z]+")


@dataclass(frozen=True)
class Document:
    name: str
    text: str
    year: int | None = None


Corpus = dict[str, list[Document]]


def load_corpus(name: str, root: Path) -> Corpus:
    """Documents by split of an embedded corpus or of a path (relative to `root`): folder, .txt(.xz) or .jsonl(.xz).

    Raises UsageError for a name that is neither, Failure with file, line and remedy for data that cannot be used.
    """
    path = source(name, root)
    if not exists(path):
        if name in EMBEDDED:
            raise Failure(f"{path}: not found; restore it with `git checkout {EMBEDDED[name]}`")
        raise UsageError(f"data.corpus is '{name}': neither an embedded corpus ({', '.join(EMBEDDED)}) nor an existing path")
    kind = file_kind(path)
    if path.is_dir():
        corpus = {split: [Document(split, read_text(path / f"{split}.txt"))] for split in SPLITS}
    elif kind == ".txt":
        corpus = _cut(path)
    elif kind == ".jsonl":
        corpus = _documents(path)
    else:
        raise UsageError(f"data.corpus is '{name}': expected a folder, or a file .txt or .jsonl (or these with .xz)")
    for split in SPLITS:
        if not any(document.text.strip() for document in corpus[split]):
            raise Failure(f"{path}: the {split} split is empty; give it at least one document with text")
    return corpus


def source(name: str, root: Path) -> Path:
    """The file or folder that a corpus or task is read from: an embedded one by its name, else a path relative to `root`."""
    return root / EMBEDDED.get(name, name)


def exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name that no file can have
        return False


def file_kind(path: Path) -> str:
    """The suffix in lower case, without that of compression."""
    return (path.with_suffix("") if path.suffix.lower() == ".xz" else path).suffix.lower()


def streams(corpus: Corpus, view_name: str) -> dict[str, str]:
    """Each split of a corpus as one stream in a view; Failure where the view leaves nothing of a split."""
    texts = {split: join([document.text for document in corpus[split]], view_name) for split in SPLITS}
    for split in SPLITS:
        if not texts[split].strip():
            raise Failure(
                f"data.view {view_name} leaves nothing of the {split} split, which has no letters a-z; use data.view: bytes"
            )
    return texts


def view(text: str, name: str) -> str:
    """`bytes`: the text as it is. `text27`: letters a-z and single spaces, digits spelled out, as text8 is made."""
    if name == "bytes":
        return text
    return _OTHER.sub(" ", text.lower().translate(_SPELLED)).strip()


def join(texts: Sequence[str], view_name: str) -> str:
    """Texts as one stream in a view, separated by the view's own blank."""
    return ("\n" if view_name == "bytes" else " ").join(view(text, view_name) for text in texts)


def read_text(path: Path) -> str:
    """A UTF-8 file, plain or .xz, without a byte-order mark."""
    try:
        data = lzma.open(path).read() if path.suffix.lower() == ".xz" else path.read_bytes()
    except FileNotFoundError:
        raise Failure(f"{path}: not found; a corpus folder needs {', '.join(f'{split}.txt' for split in SPLITS)}") from None
    except (EOFError, lzma.LZMAError) as error:
        raise Failure(f"{path}: truncated or damaged ({error}); fetch it again") from None
    except OSError as error:
        raise Failure(f"{path}: cannot be read ({error.strerror or error}); check its permissions") from None
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Failure(f"{path}: not UTF-8 at byte {error.start}; convert it, for example with iconv -t UTF-8") from None


def records(path: Path, fields: Sequence[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Numbered objects of a .jsonl(.xz) file, each with the named fields as text."""
    # Not splitlines: it also cuts at separators such as U+2028, which JSON allows inside a text.
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            raise Failure(f"{path}, line {number}: not JSON; the file may be truncated, fetch or write it again") from None
        if not isinstance(record, dict):
            raise Failure(f"{path}, line {number}: holds {type(record).__name__}, expected an object with {', '.join(fields)}")
        yield number, check_record(path, number, record, fields)


def check_record(path: Path, number: int, record: dict[str, Any], fields: Sequence[str]) -> dict[str, Any]:
    """The record itself, once every field is there as text and the split is a known one."""
    for field in fields:
        if field not in record or record[field] is None:
            there = ", ".join(f"'{name}'" for name, value in record.items() if name and value is not None)
            raise Failure(f"{path}, line {number}: no field '{field}' among {there}; every line needs {', '.join(fields)}")
        if not isinstance(record[field], str) and not (field == "label" and isinstance(record[field], int)):
            raise Failure(f"{path}, line {number}: {field} is {record[field]!r}, expected text")
        if re.search("[\ud800-\udfff]", str(record[field])):
            raise Failure(
                f"{path}, line {number}: {field} holds half of a surrogate pair (\\ud800 to \\udfff); write the character itself"
            )
    if record["split"] not in SPLITS:
        raise Failure(f"{path}, line {number}: split is '{record['split']}'; expected {', '.join(SPLITS)}")
    return record


def _documents(path: Path) -> Corpus:
    corpus: Corpus = {split: [] for split in SPLITS}
    for number, record in records(path, ("text", "split")):
        name, year = str(record.get("id", number)), record.get("year")
        corpus[record["split"]].append(Document(name, record["text"], year if isinstance(year, int) else None))
    return corpus


def _cut(path: Path) -> Corpus:
    text = read_text(path)
    first, second = (round(share * len(text)) for share in TEXT_SPLIT)
    parts = (text[:first], text[first:second], text[second:])
    return {split: [Document(f"{path.name}:{split}", part)] for split, part in zip(SPLITS, parts, strict=True)}
