"""Corpora and labelled texts: sizes, lengths, what repeats, what a view loses, and a context that fits."""

import hashlib
import re
import unicodedata
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice
from pathlib import Path

import numpy as np

from pipeline.checking.findings import Findings, Known, classes, duplicates, percent, place_in, spread, task_name
from pipeline.data.archives import MIB, encoded
from pipeline.data.corpora import Document, load_corpus, stream, view
from pipeline.data.tables import SPLITS
from pipeline.data.tasks import load_task, rows
from pipeline.errors import Failure
from pipeline.progress import Progress

LINE = 40  # characters of a line of a corpus that had better not stand there twice, and by which a warning knows it
ENOUGH = 1_000_000  # bytes of training text, under which a model had better be pre-trained on another
LETTERS, CHARACTERS = 0.005, 0.1  # shares that the view text27 may lose
CONTEXTS = tuple(2**power for power in range(3, 20))
CONTEXT = 256  # of params.yaml, which no suggestion is slower than
PASSAGE = 480  # prepare.passage

_LOWER = bytes(range(256)).lower()
_LOST = bytes(code for code in range(256) if not (code < 128 and chr(code).isalnum()) and chr(code) != "\n")


def corpus(found: Findings, root: Path) -> None:
    """Texts without labels, to pre-train on. The task is the embedded one, or made of them if they have years."""
    read = load_corpus(found.path, root)
    characters, documents, dated = _Characters(), Counter(), False
    with Progress("check", total=3 * sum(read[split].size for split in SPLITS) / MIB, unit="MiB") as progress:

        def reading(split: str) -> Iterator[Document]:
            for document in read[split]:
                yield document
                progress.advance(len(document.text) / MIB)

        for split in SPLITS:
            for document in reading(split):
                documents[split] += document.part == 0
                dated |= document.year is not None
                characters.add(document.text)
        seen = characters.report(found)
        lines = max(documents.values()) == 1
        texts = {split: _Texts(seen) for split in SPLITS}
        for split in SPLITS:
            for document in reading(split):
                if lines:
                    texts[split].add_lines(document.text)
                else:
                    texts[split].add(document.text, goes_on=document.part > 0)
            texts[split].read(reading(split))
    if dated:
        load_task("era", read, root, PASSAGE)
    _sizes(found, "documents", documents, texts)

    def names(split: str, some: list[int]) -> list[str]:
        """Read again, since the names of all may not fit in memory."""
        if lines:
            every = (f"'{line[:LINE]}...'" for document in read[split] for line in _lines(document.text))
        else:
            every = (document.name for document in read[split] if document.part == 0)
        met = {place: name for place, name in enumerate(islice(every, max(some) + 1)) if place in some}
        return [met[place] for place in some]

    _contents(found, f"lines of {LINE} characters and more" if lines else "documents", texts, names)
    if (size := texts["train"].tokens) < ENOUGH:
        found.warn(f"train has {size:,} bytes: pre-training reads them again and again and may learn them by heart; add text")
    _suggest(found, root, found.path, {"era": "era"}, CONTEXT, CONTEXT // 2, texts)
    found.notes["data.tasks"] = "periods of 40 years of the corpus" if dated else "embedded; name texts with labels instead"


def task(found: Findings, root: Path, own: bool) -> None:
    """Labelled texts; with `own` also to pre-train on, if they are enough."""
    path = root / found.path
    characters, empty = _Characters(), []
    places: dict[str, list[str]] = {split: [] for split in SPLITS}
    count: dict[str, Counter[str]] = {split: Counter() for split in SPLITS}
    for place, split, text, label, _ in rows(found.path, path):
        characters.add(text)
        count[split][label.strip()] += 1
        places[split].append(place_in(path, place))
        if not text.strip() or not label.strip():
            empty.append(place)
    labels = sorted({*chain(*count.values())})
    found.facts["classes"] = {label: {split: count[split][label] for split in SPLITS} for label in labels}
    found.facts["empty"] = len(empty)
    if len(empty) > 1:
        raise Failure(f"{empty[0]}: the text or label is empty, as in {len(empty) - 1:,} more; remove them or fill them")
    made = load_task(found.path, {}, root, PASSAGE)
    seen = characters.report(found)
    texts = {split: _Texts(seen) for split in SPLITS}
    for split in SPLITS:
        for example in made.splits[split]:
            texts[split].add(example.text, made.labels.index(example.label))
        texts[split].read(Document("", example.text) for example in made.splits[split])
    _sizes(found, "texts", {split: len(made.splits[split]) for split in SPLITS}, texts)
    groups = {split: {example.group for example in made.splits[split]} - {None} for split in SPLITS}
    alone = sum(example.group is None for example in made.splits["test"])
    if any(groups.values()):
        for split in SPLITS:
            found.facts["splits"][split]["groups"] = len(groups[split])
    classes(found, "texts", found.facts["classes"], len(groups["test"]) + alone)
    _contents(found, "texts", texts, lambda split, some: [places[split][place] for place in some], labelled=True)
    if alone and groups["test"]:
        found.warn(f"{alone:,} texts of test have no group: intervals then take none for alike; give all of them one")
    if shared := groups["test"] & groups["train"]:
        found.warn(
            f"{len(shared):,} of {len(groups['test']):,} groups of test are in train too, such as '{min(shared)}': test is like "
            "what was learnt; give each group one split"
        )
    every = np.concatenate([texts[split].bytes_each() for split in SPLITS])
    if blank := int((every == 0).sum()):
        found.warn(f"{blank:,} texts have nothing that the view {seen} keeps, and are read as a blank; bytes keeps everything")
    holding, half = (_holding(np.percentile(every, share, method="nearest")) for share in (95, 50))
    enough = own and texts["train"].tokens >= ENOUGH
    crop = half if holding <= CONTEXT else CONTEXT // 2
    tasks = {task_name(path): found.path}
    context = _suggest(found, root, found.path if enough else "sotu", tasks, min(holding, CONTEXT), crop, texts)
    few = "embedded; these texts are few to pre-train on" if own else "embedded"
    found.notes["data.corpus"] = "the same texts" if enough else few
    if context < holding:
        found.warn(
            f"{percent(float((every > context).mean()))} of the texts are longer than {context} tokens (bytes) and labelled by "
            f"their start; model.context: {holding} reads 95 % of them whole, in steps {holding // context} times as long"
        )


class _Characters:
    """What characters texts are made of."""

    def __init__(self) -> None:
        self._bytes_V = np.zeros(256, dtype=np.int64)
        self._beyond: Counter[str] = Counter()
        self._waiting: list[str] = []
        self._size = 0

    def add(self, text: str) -> None:
        self._waiting.append(text)
        self._size += len(text)
        if self._size > MIB:
            self._count()

    def report(self, found: Findings) -> str:
        """The view that loses little, and what text27 would lose."""
        self._count()
        every = self._beyond + Counter({chr(code): int(count) for code, count in enumerate(self._bytes_V[:128])})
        lost = Counter({c: n for c, n in every.items() if not (c.isspace() or (c.isascii() and c.isalnum()))})
        letters = Counter({c: n for c, n in lost.items() if c.isalpha()})
        of_all = lost.total() / max(1, every.total())
        of_letters = letters.total() / max(1, sum(n for c, n in every.items() if c.isalpha()))
        seen = "text27" if of_letters <= LETTERS and of_all <= CHARACTERS else "bytes"
        found.facts["view"] = {
            "suggested": seen,
            "characters lost by text27": of_all,
            "letters lost by text27": of_letters,
            "such as": "".join(c for c, _ in letters.most_common(10)),
        }
        if seen == "bytes":
            found.notes["data.view"] = f"text27 loses {percent(of_all)} of the characters, {percent(of_letters)} of the letters"
        control = {c: n for c, n in every.items() if unicodedata.category(c) == "Cc" and c not in "\t\n\r"}
        found.facts["control characters"] = {f"U+{ord(c):04X}": control[c] for c in sorted(control)}
        if every["\0"] > every.total() / 4:
            found.warn("most of it may be UTF-16 without its mark: convert it with `iconv -f UTF-16LE -t UTF-8`")
        elif control:
            found.warn("control characters are left over from another format or encoding, and are learnt; take them out")
        if count := every["\ufffd"]:
            found.warn(
                f"{count:,} characters were lost in an earlier conversion (U+FFFD); convert the text again from its source"
            )
        return seen

    def _count(self) -> None:
        text = "".join(self._waiting)
        data = encoded(text)
        self._bytes_V += np.bincount(np.frombuffer(data, np.uint8), minlength=256)
        if len(data) > len(text):
            self._beyond.update(re.findall("[^\x00-\x7f]", text))
        self._waiting, self._size = [], 0


class _Texts:
    """The texts of a split, in a view: lengths and hashes of each, and what they are together."""

    def __init__(self, seen: str) -> None:
        self.characters, self.bytes, self.labels = array("q"), array("q"), array("q")
        self.hashes, self.exact = array("Q"), array("Q")
        self.characters_in_all = self.tokens = 0
        self._seen = seen

    def add(self, text: str, label: int = 0, goes_on: bool = False) -> None:
        """A text, or what the last one goes on with."""
        data, own = encoded(view(text, self._seen)), encoded(text)
        self.characters_in_all += len(text)
        if goes_on:
            self.characters[-1] += len(text)
            self.bytes[-1] += len(data)
            self.hashes[-1] = _hash(self.hashes[-1].to_bytes(8) + data)
            self.exact[-1] = _hash(self.exact[-1].to_bytes(8) + own)
        else:
            self._append(len(text), len(data), data, own, label)

    def add_lines(self, text: str) -> None:
        """Lines of LINE characters and more as texts of their own.

        Of text27 those are taken for alike that have the same letters and digits: the view of each line alone takes long.
        """
        self.characters_in_all += len(text)
        data = encoded(text)
        known = data if self._seen == "bytes" else data.translate(_LOWER, _LOST)
        for line, own, key in zip(text.split("\n"), data.split(b"\n"), known.split(b"\n"), strict=True):
            if len(line) >= LINE:
                self._append(len(line), len(own), key, own, 0)

    def _append(self, characters: int, size: int, data: bytes, own: bytes, label: int) -> None:
        self.characters.append(characters)
        self.bytes.append(size)
        self.hashes.append(_hash(data))
        self.exact.append(_hash(own))
        self.labels.append(label)

    def read(self, documents: Iterable[Document]) -> None:
        """All of them as one text, as training reads it."""
        self.tokens = sum(len(encoded(text)) for text in stream(documents, self._seen))

    def bytes_each(self) -> np.ndarray:
        return np.array(self.bytes)


def _lines(text: str) -> Iterator[str]:
    return (line for line in text.split("\n") if len(line) >= LINE)


def _hash(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest())


def _sizes(found: Findings, unit: str, number: dict[str, int], texts: dict[str, _Texts]) -> None:
    found.facts["splits"] = {
        split: {unit: number[split], "characters": texts[split].characters_in_all, "tokens": texts[split].tokens}
        for split in SPLITS
    }


def _contents(
    found: Findings, unit: str, texts: dict[str, _Texts], names: Callable[[str, list[int]], list[str]], labelled: bool = False
) -> None:
    """Lengths and what repeats; of nothing but empty texts or short lines, neither."""
    characters, size = (np.concatenate([np.array(getattr(texts[s], of)) for s in SPLITS]) for of in ("characters", "bytes"))
    if len(size):
        found.facts["lengths"] = {"of": unit, "characters": spread(characters), "bytes": spread(size)}
    known = {}
    for split in SPLITS:
        (there,) = np.nonzero(texts[split].bytes_each())
        arrays = (np.array(of)[there] for of in (texts[split].hashes, texts[split].exact, texts[split].labels))
        known[split] = Known(*arrays, lambda some, split=split, there=there: names(split, there[some].tolist()))
    duplicates(found, unit, known, "in the view text27, without case, signs and spacing", labelled)
    found.facts["empty"] = int((size == 0).sum())


def _holding(length: float) -> int:
    """The smallest context that holds so many bytes."""
    return next((size for size in CONTEXTS if size >= length), CONTEXTS[-1])


def fitting(context: int, tokens: int) -> int:
    """The context, halved until a split of so many tokens is longer."""
    while context >= tokens:
        context //= 2
    return context


def _suggest(
    found: Findings, root: Path, source: str, tasks: dict[str, str], context: int, crop: int, texts: dict[str, _Texts]
) -> int:
    """Sections of params.yaml, with a context for which every split has enough text; that context."""
    smallest = min(SPLITS, key=lambda split: texts[split].tokens)
    context = fitting(context, texts[smallest].tokens)
    if context < CONTEXTS[0]:
        raise Failure(f"{root / found.path}: {smallest} has too little text for a context of {CONTEXTS[0]} bytes; add some")
    seen = found.facts["view"]["suggested"]
    found.params = {
        "data": {"corpus": source, "view": seen, "tokenizer": "bytes", "vocabulary": 0, "tasks": tasks, "shifts": {}},
        "model": {"context": context, "evaluate_context": context},
        "finetune": {"crop": min(crop, context)},
    }
    return context
