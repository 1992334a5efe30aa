"""Labelled tasks: the era task made from the embedded corpus, tasks as published, or a file of text, label and split."""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.data import archives, published, tables
from pipeline.data.corpora import Corpus, exists, folder_texts, load_corpus, read_text
from pipeline.data.tables import SPLITS, file_kind
from pipeline.errors import Failure, UsageError
from pipeline.files import nearest_path

ERA_FIRST, ERA_YEARS = 1790, 40
EXAMPLES = "examples.jsonl"

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


@dataclass(frozen=True)
class Example:
    """A text with its label; `group` is what it was taken from, such as a document, with others that are like it."""

    text: str
    label: str
    group: str | None = None


@dataclass(frozen=True)
class Task:
    """Labels in order of their index, and the examples of each split."""

    labels: tuple[str, ...]
    splits: dict[str, list[Example]]


def load_task(name: str, corpus: Corpus, root: Path, passage: int) -> Task:
    """`era`, made from the corpus or, where that has no years, the embedded one; a published task by name; or a path (relative to
    `root`).

    A path is a file of records (`tables`), a folder of texts in a folder for each class, split as a corpus of it would be, or a
    task as published: folder, zip or tar.
    Raises UsageError for a name that is none of these, Failure for data that cannot be used.
    """
    if name == "era":
        if next(iter(corpus["train"])).year is None:
            corpus = load_corpus("sotu", root)
        if any(document.year is None for split in SPLITS for document in corpus[split]):
            raise UsageError(
                "data.tasks has 'era': the corpus has documents with a year and without; give all one, or name a labelled file"
            )
        examples = {split: list(_eras(corpus, split, passage)) for split in SPLITS}
        return _checked("task era", examples, {})
    path = published.fetch(name, root) if name in published.TASKS else root / name
    if not exists(path):
        known = ("era", *published.TASKS)
        near = nearest_path(name, root, known)
        raise UsageError(f"data.tasks has '{name}': neither {', '.join(known)} nor an existing path{near}")
    examples = {split: [] for split in SPLITS}
    places: dict[tuple[str, str], str] = {}
    for place, split, text, label, group in rows(name, path):
        if not text.strip():
            raise Failure(f"{place}: the text is empty; remove the line or fill it")
        if not label.strip():
            raise Failure(f"{place}: the label is empty; remove the line or fill it")
        examples[split].append(Example(text, label.strip(), group))
        places.setdefault((split, label.strip()), place)
    return _checked(str(path), examples, places)


def rows(name: str, path: Path) -> Iterator[tuple[str, str, str, str, str | None]]:
    """Place, split, text, label and group of every example of a task by name or of a path, as they are."""
    if not path.is_dir() and file_kind(path) in tables.READERS:
        for number, record in tables.records(path, ("text", "label")):
            yield tables.place(path, number), record["split"], record["text"], str(record["label"]), tables.group(record)
    elif path.is_dir() and not published.recognised(path):
        yield from _folders(path)
    elif archives.is_archive(path):
        labels = published.TASKS[name].labels if name in published.TASKS else None
        for number, (split, text, label) in enumerate(published.read(path, labels), 1):
            yield f"{path}, example {number}", split, text, label, None
    else:
        raise UsageError(
            f"data.tasks has '{name}': expected a file {tables.FILES}, a folder with a folder of texts for each class, or a task "
            "as published: a folder, a zip or a tar"
        )


def task_source(name: str, root: Path) -> Path:
    """The file or folder that a task is read from; era has none of its own."""
    return published.source(name, root) if name in published.TASKS else root / name


def write_task(folder: Path, task: Task) -> None:
    """One JSON object per example."""
    folder.mkdir(parents=True)
    with open(folder / EXAMPLES, "w", encoding="utf-8") as file:
        for split in SPLITS:
            for example in task.splits[split]:
                group = {} if example.group is None else {"group": example.group}
                record = {"text": example.text, "label": example.label, "split": split} | group
                file.write(json.dumps(record, ensure_ascii=False) + "\n")


def read_task(folder: Path) -> Task:
    """The task that `write_task` wrote."""
    path = folder / EXAMPLES
    if not path.exists():
        raise Failure(f"{path}: not found; run `vqmoe prepare` again")
    return load_task(path.name, {}, path.parent, passage=0)


def groups(examples: Sequence[Example]) -> dict[str, np.ndarray]:
    """`groups`: a number (P,) for what each of P examples was taken from; nothing where some were taken from nowhere."""
    names = [example.group for example in examples]
    return {} if None in names else {"groups": np.unique(names, return_inverse=True)[1].astype(np.int64)}


def passages(text: str, length: int) -> list[str]:
    """Whole sentences up to about `length` characters each; a sentence over twice that is cut at spaces.

    A tail shorter than a quarter of `length` joins the passage before it.
    """
    result: list[str] = []
    current = ""
    for sentence in _sentences(text, 2 * length):
        current = f"{current} {sentence}" if current else sentence
        if len(current) >= length:
            result.append(current)
            current = ""
    if current and result and len(current) < length / 4:
        result[-1] += " " + current
    elif current:
        result.append(current)
    return result


def _sentences(text: str, longest: int) -> Iterator[str]:
    for sentence in _SENTENCE_END.split(text.strip()):
        while len(sentence) > longest:
            cut = sentence.rfind(" ", 1, longest)
            cut = cut if cut > 0 else longest
            yield sentence[:cut]
            sentence = sentence[cut:].lstrip()
        if sentence:
            yield sentence


def _eras(corpus: Corpus, split: str, passage: int) -> Iterator[Example]:
    for document in corpus[split]:
        first = document.year - (document.year - ERA_FIRST) % ERA_YEARS
        for text in passages(document.text, passage):
            yield Example(text, f"{first}-{first + ERA_YEARS - 1}", document.name)


def _folders(path: Path) -> Iterator[tuple[str, str, str, str, None]]:
    """Texts whose label is the name of the folder that they lie in."""
    for split, names in folder_texts(path).items():
        for name in names:
            if "/" not in name:
                raise Failure(f"{path / name}: lies in no folder of a class; put it into one, or elsewhere")
            yield str(path / name), split, read_text(path / name), name.split("/")[-2], None


def _checked(source: str, examples: dict[str, list[Example]], places: dict[tuple[str, str], str]) -> Task:
    for split in SPLITS:
        if not examples[split]:
            raise Failure(f"{source}: the {split} split is empty; give it at least one example")
    labels = tuple(sorted({example.label for example in examples["train"]}))
    if len(labels) < 2:
        raise Failure(f"{source}: training has the one label '{labels[0]}'; a task needs at least two")
    for split in SPLITS[1:]:
        for label in sorted({example.label for example in examples[split]} - set(labels)):
            place = places.get((split, label), source)
            raise Failure(f"{place}: label '{label}' is in {split} but never in train; add training examples or drop it")
    return Task(labels, examples)
