"""Read corpus and task, write tokens, tokenizer, task and a manifest with what there is and what to compare with."""

from types import SimpleNamespace

from pipeline.data.batches import write_tokens
from pipeline.data.corpora import SPLITS, join, load_corpus, streams
from pipeline.data.references import compressors, language_references, tfidf
from pipeline.data.tasks import load_task, write_task
from pipeline.data.tokenizers import Tokenizer
from pipeline.files import digest, output_folder, write_json
from pipeline.progress import Progress
from stages.paths import Paths


def run(params: SimpleNamespace, paths: Paths) -> dict:
    """Returns counts and the references: bits per character of compressors on test, TF-IDF's accuracy."""
    data = params.data
    with Progress("prepare", total=5, unit="step") as progress:
        corpus = load_corpus(data.corpus, paths.root)
        task = load_task(data.task, corpus, paths.root, params.prepare.passage)
        progress.advance()
        texts = streams(corpus, data.view)
        tokenizer = Tokenizer.make(data.tokenizer, [texts["train"]], data.vocabulary)
        tokens = {split: tokenizer.encode(text) for split, text in texts.items()}
        progress.advance()
        test = texts["test"].encode()
        references = language_references(compressors(test), tokens["test"], len(test), tokenizer.unit)
        progress.advance()
        references["tfidf"] = tfidf(task, params.prepare.vocabulary, data.view)
        progress.advance()
        counts = {
            "documents": {split: len(corpus[split]) for split in SPLITS},
            "characters": {split: len(texts[split]) for split in SPLITS},
            "tokens": {split: len(tokens[split]) for split in SPLITS},
            "examples": {split: len(task.splits[split]) for split in SPLITS},
        }
        labels = {
            split: {label: sum(example.label == label for example in task.splits[split]) for label in task.labels}
            for split in SPLITS
        }
        with output_folder(paths.data) as folder:
            for split in SPLITS:
                write_tokens(folder / f"{split}.npy", [tokens[split]], tokenizer.dtype)
            if data.view == "text27" and tokenizer.kind == "bytes":
                write_tokens(folder / "raw.npy", [tokenizer.encode(join([d.text for d in corpus["test"]], "bytes"))])
            tokenizer.save(folder / "tokenizer.json")
            write_task(folder / "task.jsonl", task)
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
        progress.advance()
    return counts | {"references": references}
