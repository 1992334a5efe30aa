"""Read what models learn from and are tested on, bring it into the form they read, and say what to compare scores with."""

from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from pipeline.data.archives import MIB, encoded
from pipeline.data.batches import open_tokens, write_tokens
from pipeline.data.corpora import SPLITS, Document, load_corpus, stream
from pipeline.data.references import compressors, language_references, pixels, tfidf
from pipeline.data.tasks import Task, load_task, write_task
from pipeline.data.tokenizers import Tokenizer
from pipeline.errors import Failure
from pipeline.files import digest, output_folder, write_json
from pipeline.progress import Progress
from stages.paths import Paths, of_images


def run(params: SimpleNamespace, paths: Paths) -> dict:
    """Writes what is pre-trained on (source/), tasks/, shifts/, of images outside/ too, and a manifest.

    Returns counts and the references: bits per character of compressors on test, and in every task what a linear classifier
    scores, of words (TF-IDF) or pixels.
    """
    with output_folder(paths.data) as folder:
        for name in ("source", "tasks", "shifts", *(("outside",) if of_images(params.data.view) else ())):
            (folder / name).mkdir()
        counts, more = (_images if of_images(params.data.view) else _texts)(params, paths, folder)
        written = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        files = {path.relative_to(folder).as_posix(): digest(path) for path in written}
        write_json(folder / "manifest.json", params.data.model_dump() | counts | more | {"sha256": files})
    return counts | {key: more[key] for key in ("classes", "references") if key in more}


def _texts(params: SimpleNamespace, paths: Paths, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    data = params.data
    corpus = load_corpus(data.corpus, paths.root)
    tasks = {name: load_task(source, corpus, paths.root, params.prepare.passage) for name, source in data.tasks.items()}
    shifts = {name: load_corpus(source, paths.root, f"data.shifts.{name}") for name, source in data.shifts.items()}
    tokenizer = Tokenizer.make(data.tokenizer, stream(corpus["train"], data.view), data.vocabulary)
    with Progress("prepare", total=sum(corpus[split].size for split in SPLITS) / MIB, unit="MiB") as progress:
        written = {
            split: _write_text(
                folder / f"source/{split}.npy", _shown(corpus[split], progress), data.view, tokenizer, split == "test"
            )
            for split in SPLITS
        }
    for split in SPLITS:
        if not written[split]["tokens"]:
            raise Failure(
                f"data.view {data.view} leaves nothing of the {split} split, which has no letters a-z; use data.view: bytes"
            )
    others = {name: (shift["test"], data.view) for name, shift in shifts.items()}
    if data.view == "text27" and tokenizer.kind == "bytes":
        others["raw"] = corpus["test"], "bytes"
    for name, (documents, view) in others.items():
        if not _write_text(folder / f"shifts/{name}.npy", documents, view, tokenizer, True)["tokens"]:
            raise Failure(f"data.shifts: nothing of {name} is left in this view; use data.view: bytes, or drop it")
    tokenizer.save(folder / "source/tokenizer.json")
    for name, task in tasks.items():
        write_task(folder / "tasks" / name, task)
    with Progress("references", total=1 + len(tasks)) as progress:
        compressed = compressors(map(encoded, stream(corpus["test"], data.view)))
        test = open_tokens(folder / "source/test.npy", tokenizer.size)
        references = language_references(compressed, test, written["test"]["bytes"], tokenizer.unit)
        progress.advance()
        references |= {"classifier": "TF-IDF", "tasks": {}}
        for name, task in tasks.items():
            references["tasks"][name] = tfidf(task, params.prepare.vocabulary, data.view)
            progress.advance()
    counts = {
        **{key: {split: written[split][key] for split in SPLITS} for key in ("documents", "characters", "tokens")},
        "examples": {name: {split: len(task.splits[split]) for split in SPLITS} for name, task in tasks.items()},
    }
    labels = {name: {split: _labels(task, split) for split in SPLITS} for name, task in tasks.items()}
    return counts, {"ids": tokenizer.size, "labels": labels, "references": references}


def _images(params: SimpleNamespace, paths: Paths, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    from pipeline.data.image_decode import load_images, load_outside, load_shift
    from pipeline.data.images import ImageSet, write_images, write_set

    data, given = params.data, params.prepare
    sources = {"images": data.corpus} | dict(data.tasks)
    others = {"shifts": (load_shift, data.shifts), "outside": (load_outside, data.outside)}
    sets: dict[str, ImageSet] = {}  # by source, which is read once
    counts = {"examples": {}, "skipped": {}}
    with Progress("prepare", total=len(sources) + len(data.shifts) + len(data.outside), unit="set") as progress:
        for name, source in sources.items():
            place = folder / "source" if name == "images" else folder / "tasks" / name
            if source not in sets:
                sets[source] = load_images(source, paths.root, data.view, given.size, given.valid, given.broken)
            found = sets[source]
            write_set(place, found)
            counts["examples"][name] = {split: len(found.splits[split].labels_N) for split in SPLITS}
            counts["skipped"][name] = found.skipped
            progress.advance()
        for place, (load, named) in others.items():
            for name, source in named.items():
                found, skipped = load(source, paths.root, data.view, given.size, sets[data.corpus].classes, given.broken)
                write_images(folder / place / name, found)
                counts["skipped"][name] = skipped
                progress.advance()
    with Progress("references", total=len(sets)) as progress:
        linear = {}
        for source, found in sets.items():
            linear[source] = pixels(found.splits["train"], found.splits["test"])
            progress.advance()
    tasks = {name: linear[source] for name, source in sources.items()}
    classes = {name: list(sets[source].classes) for name, source in sources.items()}
    return counts, {"classes": classes, "references": {"classifier": "logistic regression on pixels", "tasks": tasks}}


def _labels(task: Task, split: str) -> dict[str, int]:
    count = Counter(example.label for example in task.splits[split])
    return {label: count[label] for label in task.labels}


def _shown(documents: Iterable[Document], progress: Progress) -> Iterator[Document]:
    for document in documents:
        yield document
        progress.advance(len(encoded(document.text)) / MIB)


def _write_text(path: Path, documents: Iterable[Document], view: str, tokenizer: Tokenizer, scored: bool) -> Counter[str]:
    """Write a text's tokens, of which no more than a stretch is in memory, and to <name>.documents.npy, of a text that is scored,
    the place of the first of each document; returns what was counted on the way.
    """
    counts: Counter[str] = Counter()
    # A test split may have hundreds of thousands of documents.
    places = array("q")

    def counted() -> Iterator[Document]:
        for document in documents:
            counts["documents"] += document.part == 0
            yield document

    def ids() -> Iterator[np.ndarray]:
        number = 0
        for text in stream(counted(), view):
            if number != counts["documents"]:
                number = counts["documents"]
                places.append(counts["tokens"])
            counts["characters"] += len(text)
            counts["bytes"] += len(encoded(text))
            written = tokenizer.encode(text)
            counts["tokens"] += len(written)
            yield written

    write_tokens(path, ids(), tokenizer.dtype)
    if scored:
        np.save(path.with_suffix(".documents.npy"), np.array(places, dtype=np.int64))
    return counts
