"""Read corpus and task, write tokens, tokenizer, task and a manifest with what there is and what to compare with."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from pipeline.data.archives import MIB, encoded
from pipeline.data.batches import open_tokens, write_tokens
from pipeline.data.corpora import SPLITS, Document, Split, load_corpus, stream
from pipeline.data.references import compressors, tfidf, unigram_entropy
from pipeline.data.tasks import load_task, write_task
from pipeline.data.tokenizers import Tokenizer
from pipeline.errors import Failure
from pipeline.files import digest, output_folder, write_json
from pipeline.progress import Progress
from stages.paths import Paths


def run(params: SimpleNamespace, paths: Paths) -> dict:
    """Returns counts and the references: bits per character of compressors on test, TF-IDF's accuracy."""
    data = params.data
    corpus = load_corpus(data.corpus, paths.root)
    task = load_task(data.task, corpus, paths.root, params.prepare.passage)
    tokenizer = Tokenizer.bytes()
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
        if data.view == "text27":
            write_tokens(folder / "raw.npy", map(tokenizer.encode, stream(corpus["test"], "bytes")))
        tokenizer.save(folder / "tokenizer.json")
        write_task(folder / "task.jsonl", task)
        with Progress("references", total=2) as progress:
            bits = compressors(map(encoded, stream(corpus["test"], data.view)))
            bits["unigram"] = unigram_entropy(open_tokens(folder / "test.npy"))
            progress.advance()
            references = {"bits_per_character": bits, "tfidf": tfidf(task, params.prepare.vocabulary, data.view)}
            progress.advance()
        counts = {
            **{key: {split: written[split][key] for split in SPLITS} for key in ("documents", "characters", "tokens")},
            "examples": {split: len(task.splits[split]) for split in SPLITS},
        }
        labels = {
            split: {label: sum(example.label == label for example in task.splits[split]) for label in task.labels}
            for split in SPLITS
        }
        files = {path.name: digest(path) for path in sorted(folder.iterdir())}
        write_json(
            folder / "manifest.json",
            {
                "corpus": data.corpus,
                "view": data.view,
                "task": data.task,
                "vocabulary": tokenizer.size,
                **counts,
                "labels": labels,
                "references": references,
                "sha256": files,
            },
        )
    return counts | {"references": references}


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
            yield tokenizer.encode(text)

    counts["tokens"] = write_tokens(path, ids())
    return counts
