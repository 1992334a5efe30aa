"""Corpora as splits of documents, read as they are needed, and the two views of a text."""

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.data import archives, tables
from pipeline.data.tables import CUTS, SPLITS, file_kind
from pipeline.errors import Failure, UsageError
from pipeline.files import nearest_path

EMBEDDED = {"sotu": "data/sotu.jsonl.xz", "austen": "data/austen.txt.xz"}
# What the splits of a folder or an .npz may be called.
NAMES = {"train": ("train",), "valid": ("valid", "val"), "test": ("test",)}


class Published(NamedTuple):
    """A corpus in the archive that its authors publish: the members of each split, or the one member that is cut."""

    url: str
    sha256: str | None
    members: dict[str, list[str]] | str


_BILLION = "1-billion-word-language-modeling-benchmark-r13output"
_HELD_OUT = f"{_BILLION}/heldout-monolingual.tokenized.shuffled/news.en.heldout-{{:05d}}-of-00050"

PUBLISHED = {
    # sha256: datasets/enwik8/dataset_infos.json of github.com/huggingface/datasets.
    "enwik8": Published(
        "http://mattmahoney.net/dc/enwik8.zip", "547994d9980ebed1288380d652999f38a14fe291a6247c157c3d33d4932534bc", "enwik8"
    ),
    # sha256: src/local_ai_training/data.py of github.com/LoomNode/local-ai-training; others have the same.
    "text8": Published(
        "http://mattmahoney.net/dc/text8.zip", "a6640522afe85d1963ad56c05b0ede0a0c000dddc9671758a6cc09b7a38e5232", "text8"
    ),
    # sha256: datasets/wikitext/dataset_infos.json of github.com/huggingface/datasets, for the file at its first address,
    # s3.amazonaws.com/research.metamind.io, which is gone; this is the one of its first author.
    "wikitext-103": Published(
        "https://wikitext.smerity.com/wikitext-103-v1.zip",
        "242ba0f20b329cfdf1ccc61e9e9e5b59becf189db7f7a81cd2a0e2fc31539590",
        {split: [f"wikitext-103/wiki.{split}.tokens"] for split in SPLITS},
    ),
    # sha256: tensorflow_datasets/url_checksums/lm1b.txt of github.com/tensorflow/datasets. Shard 0 of 100 is the held-out one,
    # in 50 shards of its own. VQMoE's released code takes the first of these for validation and for test alike.
    "lm1b": Published(
        f"http://www.statmt.org/lm-benchmark/{_BILLION}.tar.gz",
        "01ba60381110baf7f189dfd2b8374de371e8c9a340835793f190bdae9e90a34e",
        {
            "train": [f"{_BILLION}/training-monolingual.tokenized.shuffled/news.en-{i:05d}-of-00100" for i in range(1, 100)],
            "valid": [_HELD_OUT.format(0)],
            "test": [_HELD_OUT.format(1)],
        },
    ),
}

_DIGITS = dict(zip("0123456789", "zero one two three four five six seven eight nine".split(), strict=True))
_LETTERS = bytes(code if chr(code) in "abcdefghijklmnopqrstuvwxyz" else 32 for code in range(256))


@dataclass(frozen=True)
class Document:
    """A text, or of a long one a stretch: number `part` of those that make up the text one after the other."""

    name: str
    text: str
    year: int | None = None
    part: int = 0


@dataclass(frozen=True)
class Split:
    """The documents of a split, read from their source each time they are gone through.

    `size` is about how many bytes of text they have.
    """

    size: int
    read: Callable[[], Iterator[Document]]

    def __iter__(self) -> Iterator[Document]:
        return self.read()


Corpus = dict[str, Split]


def load_corpus(name: str, root: Path, key: str = "data.corpus") -> Corpus:
    """Splits of a corpus by its name, downloaded if need be, or of a path (relative to `root`): a folder of texts, a .txt, or a
    file of records (`tables`).

    Raises UsageError for a name that is neither, which says that `key` has it; Failure with file, line and remedy for data that
    cannot be used; what is wrong inside a long text may only be found while it is read.
    """
    path = source(name, root)
    if name in PUBLISHED:
        url, sha256, members = PUBLISHED[name]
        path = archives.fetch(url, sha256, path.parent)
        return _cut_member(path, members) if isinstance(members, str) else _members(path, members)
    if not exists(path):
        if name in EMBEDDED:
            raise Failure(f"{path}: not found; restore it with `git checkout {EMBEDDED[name]}`")
        known = (*EMBEDDED, *PUBLISHED)
        raise UsageError(
            f"{key} has '{name}': neither a corpus by name ({', '.join(known)}) nor an existing path"
            f"{nearest_path(name, root, known)}"
        )
    kind = file_kind(path)
    if path.is_dir():
        corpus = _folder(path)
    elif kind == ".txt":
        corpus = _cut_file(path)
    elif kind in tables.READERS:
        corpus = _records(path)
    else:
        raise UsageError(f"{key} has '{name}': expected a folder, or a file .txt, {tables.FILES}")
    for split in SPLITS:
        if not any(document.text.strip() for document in corpus[split]):
            raise Failure(f"{path}: the {split} split is empty; give it at least one document with text")
    return corpus


def source(name: str, root: Path) -> Path:
    """The file or folder that a corpus or task is read from: that of its name, else a path relative to `root`."""
    if name in PUBLISHED:
        return archives.folder(root) / archives.file_name(PUBLISHED[name].url)
    return root / EMBEDDED.get(name, name)


def exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name that no file can have
        return False


def stream(documents: Iterable[Document], view_name: str) -> Iterator[str]:
    """Documents as one text in a view, in stretches that cut no word; a line ends between two documents.

    In `text27`, blanks collapse across stretches and documents. A text that is in this view already, as text8 is, stays
    as it is: a space at either end of it is kept, other blanks there are not.
    """
    texts = _joined(documents)
    return texts if view_name == "bytes" else _text27(texts)


def view(text: str, name: str) -> str:
    """`bytes`: the text as it is. `text27`: letters a-z and single spaces, digits spelled out, as text8 is made."""
    return text if name == "bytes" else _spelled(text).strip()


def join(texts: Iterable[str], view_name: str) -> str:
    """Texts as one in a view."""
    return "".join(stream((Document("", text) for text in texts), view_name))


def read_text(path: Path) -> str:
    """A UTF-8 file, plain or compressed, without a byte-order mark."""
    return "".join(tables.texts(path))


def named_splits(path: Path, there: Callable[[str], bool]) -> dict[str, str]:
    """What the splits that are there are called; the one beside train is test, whatever it is called."""
    if there("valid") and there("val"):
        raise Failure(f"{path}: has both valid and val; keep one of them")
    names = {split: name for split, accepted in NAMES.items() for name in accepted if there(name)}
    if "test" not in names and "valid" in names:
        names["test"] = names.pop("valid")
    return names


def folder_texts(path: Path) -> dict[str, list[str]]:
    """Names of the texts of each split: train.txt, valid.txt and test.txt, what lies below train/, valid/ and test/, or, with
    none of these, all .txt files anywhere below, split by file.
    """
    with archives.open(path) as folder:
        names = [name for name in folder.names() if name.lower().endswith(".txt")]
    if wrong := [name for name in names if re.search("[\ud800-\udfff]", name)]:
        raise Failure(f"{path / wrong[0]}: its name is not UTF-8; rename it")
    given = [f"{split}.txt" for split in SPLITS]
    if set(given) & set(names):
        if missing := [name for name in given if name not in names]:
            raise Failure(f"{path / missing[0]}: not found; a folder of texts needs {', '.join(given)}")
        return {split: [name] for split, name in zip(SPLITS, given, strict=True)}
    tops = {name.split("/")[0] for name in names if "/" in name}
    named = named_splits(path, tops.__contains__)
    if {"train", "test"} <= named.keys():
        texts = {split: [name for name in names if name.startswith(f"{top}/")] for split, top in named.items()}
        if "valid" not in texts:
            texts["valid"], texts["train"] = _held_out(texts["train"])
        return texts
    if len(names) < len(SPLITS):
        raise Failure(
            f"{path}: holds {len(names)} .txt files; a folder of texts needs {', '.join(given)}, or three .txt files and more "
            "to be split by file"
        )
    test, rest = _held_out(names)
    valid, train = rest[: len(test)], rest[len(test) :]
    return {"train": train, "valid": valid, "test": test}


def _held_out(names: list[str]) -> tuple[list[str], list[str]]:
    """A twentieth of the names of files, at least one, and the rest, in an order that only they decide."""
    order = sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())
    count = max(1, round((1 - CUTS[0]) / 2 * len(names)))
    return order[:count], order[count:]


def _spelled(text: str) -> str:
    """Letters a-z, and a space for what else there is between, before and after them; in bytes, much faster than by a regex."""
    text = text.lower()
    for digit, word in _DIGITS.items():
        text = text.replace(digit, f" {word} ")
    seen = text.encode("ascii", "replace").translate(_LETTERS)
    while b"  " in seen:
        seen = seen.replace(b"  ", b" ")
    return seen.decode()


def _joined(documents: Iterable[Document]) -> Iterator[str]:
    last = "\n"
    for document in documents:
        glue = "\n" if document.part == 0 and last != "\n" else ""
        yield glue + document.text
        last = document.text[-1:] or last


def _text27(texts: Iterable[str]) -> Iterator[str]:
    first = last = blank = ""
    begun = False
    for text in texts:
        first, last = first or text[:1], text[-1:] or last
        seen = _spelled(blank + text)
        letters = seen.rstrip()
        if letters:
            yield letters if begun or first == " " else letters.lstrip()
            begun = True
        # A blank is held back until a letter follows it.
        blank = seen[len(letters) :]
    if begun and last == " ":
        yield blank


def _parts(name: str, texts: Iterable[str]) -> Iterator[Document]:
    return (Document(name, text, part=part) for part, text in enumerate(texts))


def _records(path: Path) -> Corpus:
    sizes = dict.fromkeys(SPLITS, 0)
    for _, record in tables.records(path, ("text",)):
        sizes[record["split"]] += len(record["text"].encode())

    def read(split: str) -> Iterator[Document]:
        for number, record in tables.records(path, ("text",)):
            if record["split"] == split:
                year = record.get("year")
                yield Document(str(record.get("id", number)), record["text"], year if isinstance(year, int) else None)

    return {split: Split(size, partial(read, split)) for split, size in sizes.items()}


def _folder(path: Path) -> Corpus:
    return _members(path, folder_texts(path))


def _members(path: Path, members: dict[str, list[str]]) -> Corpus:
    """Files of an archive or folder, each a document, in the archive's order: it may only be read from front to back."""
    with archives.open(path) as archive:
        sizes = {split: sum(map(archive.size, names)) for split, names in members.items()}

    def read(split: str) -> Iterator[Document]:
        left = set(members[split])
        with archives.open(path) as archive:
            for name in archive.names():
                if name in left:
                    yield from _parts(name, archive.texts(name))
                    left.remove(name)
                    if not left:
                        return

    return {split: Split(sizes[split], partial(read, split)) for split in SPLITS}


def _cut_member(path: Path, member: str) -> Corpus:
    """One file of an archive, cut at exact bytes."""
    with archives.open(path) as archive:
        size = archive.size(member)

    def read(split: str, start: int, stop: int) -> Iterator[Document]:
        with archives.open(path) as archive:
            chunks = _between(archive.chunks(member), start, stop)
            yield from _parts(f"{member}:{split}", archives.decoded(chunks, str(path), exact=True))

    return {split: Split(stop - start, partial(read, split, start, stop)) for split, start, stop in _cuts(size)}


def _cut_file(path: Path) -> Corpus:
    """A text file, cut between characters."""
    characters = size = 0
    for text in tables.texts(path):
        characters += len(text)
        size += len(text.encode())

    def read(split: str, start: int, stop: int) -> Iterator[Document]:
        yield from _parts(f"{path.name}:{split}", _between(tables.texts(path), start, stop))

    return {
        split: Split(size * (stop - start) // max(1, characters), partial(read, split, start, stop))
        for split, start, stop in _cuts(characters)
    }


def _cuts(length: int) -> list[tuple[str, int, int]]:
    """Where each split of a single text starts and stops."""
    places = [0, *(round(share * length) for share in CUTS), length]
    return [(split, *span) for split, span in zip(SPLITS, pairwise(places), strict=True)]


def _between(pieces: Iterable[Any], start: int, stop: int) -> Iterator[Any]:
    """What lies between two places of a text or of bytes that come in pieces."""
    done = 0
    for piece in pieces:
        if part := piece[max(0, start - done) : max(0, stop - done)]:
            yield part
        done += len(piece)
        if done >= stop:
            return
