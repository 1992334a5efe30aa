"""Read corpus and task, write tokens, tokenizer, task and a manifest with what there is and what to compare with."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from pipeline.data.archives import MIB, encoded
from pipeline.data.batches import open_tokens, write_tokens
from pipeline.data.corpora import SPLITS, Document, Split, load_corpus, stream
from pipeline.data.references import compressors, language_references, tfidf
from pipeline.data.tasks import Task, load_task, write_task
from pipeline.data.tokenizers import Tokenizer
from pipeline.errors import Failure
from pipeline.files import digest, output_folder, write_json
from pipeline.progress import Progress
from stages.paths import Paths


def run(params: SimpleNamespace, paths: Paths) -> dict:
    """Returns counts and the references: bits per character of compressors on test, TF-IDF's accuracy in every task."""
    data = params.data
    corpus = load_corpus(data.corpus, paths.root)
    tasks = {name: load_task(source, corpus, paths.root, params.prepare.passage) for name, source in data.tasks.items()}
    shifts = {name: load_corpus(source, paths.root) for name, source in data.shifts.items()}
    tokenizer = Tokenizer.make(data.tokenizer, stream(corpus["train"], data.view), data.vocabulary)
    with output_folder(paths.data) as folder:
        with Progress("prepare", total=sum(corpus[split].size for split in SPLITS) / MIB, unit="MiB") as progress:
            written = {
                split: _write_split(folder / f"{split}.npy", corpus[split], data.view, tokenizer, progress) for split in SPLITS
            }
        for split in SPLITS:
            if not written[split]["tokens"]:
                raise Failure(
                    f"data.view {data.view} leaves nothing of the {split} split, which has no letters a-z; use data.view: bytes"
                )
        (folder / "shifts").mkdir()
        for name, shift in shifts.items():
            _write_tokens(folder / f"shifts/{name}.npy", tokenizer, stream(shift["test"], data.view))
        if data.view == "text27" and tokenizer.kind == "bytes":
            _write_tokens(folder / "shifts/raw.npy", tokenizer, stream(corpus["test"], "bytes"))
        tokenizer.save(folder / "tokenizer.json")
        (folder / "tasks").mkdir()
        for name, task in tasks.items():
            write_task(folder / f"tasks/{name}.jsonl", task)
        with Progress("references", total=1 + len(tasks)) as progress:
            compressed = compressors(map(encoded, stream(corpus["test"], data.view)))
            test = open_tokens(folder / "test.npy", tokenizer.size)
            references = language_references(compressed, test, written["test"]["bytes"], tokenizer.unit)
            progress.advance()
            references["tfidf"] = {}
            for name, task in tasks.items():
                references["tfidf"][name] = tfidf(task, params.prepare.vocabulary, data.view)
                progress.advance()
        counts = {
            **{key: {split: written[split][key] for split in SPLITS} for key in ("documents", "characters", "tokens")},
            "examples": {name: {split: len(task.splits[split]) for split in SPLITS} for name, task in tasks.items()},
        }
        labels = {name: {split: _labels(task, split) for split in SPLITS} for name, task in tasks.items()}
        files = {path.name: digest(path) for path in sorted(folder.iterdir())}
        write_json(
            folder / "manifest.json",
            {
                **data.model_dump(),
                "ids": tokenizer.size,
                **counts,
                "labels": labels,
                "references": references,
                "sha256": files,
            },
        )
    return counts | {"references": references}


def _labels(task: Task, split: str) -> dict[str, int]:
    count = Counter(example.label for example in task.splits[split])
    return {label: count[label] for label in task.labels}


def _write_tokens(path: Path, tokenizer: Tokenizer, texts: Iterator[str]) -> None:
    if not write_tokens(path, map(tokenizer.encode, texts), tokenizer.dtype):
        raise Failure(f"data.shifts: nothing of {path.stem} is left in this view; use data.view: bytes, or drop it")


def _write_split(path: Path, split: Split, view: str, tokenizer: Tokenizer, progress: Progress) -> Counter[str]:
    """Write a split's tokens, of which no more than a stretch is in memory; returns what was counted on the way."""
    counts: Counter[str] = Counter()

    def documents() -> Iterator[Document]:
        for document in split:
            counts["documents"] += document.part == 0
            yield document
            progress.advance(len(encoded(document.text)) / MIB)

    def ids() -> Iterator[np.ndarray]:
        for text in stream(documents(), view):
            counts["characters"] += len(text)
            counts["bytes"] += len(encoded(text))
            yield tokenizer.encode(text)

    counts["tokens"] = write_tokens(path, ids(), tokenizer.dtype)
    return counts
