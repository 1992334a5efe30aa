"""Use a trained model from the command line: go on with a text, label texts or images."""

import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from pipeline import serving, tracking
from pipeline.config import Params
from pipeline.data.corpora import read_text
from pipeline.errors import UsageError
from stages.paths import Cell, Paths

# Texts or images at a time, so that there may be more of them than memory.
BATCH = 64
SHOWN = 60


@contextmanager
def folder_of(source: str | Path, root: Path) -> Iterator[Path]:
    """The folder of the model that `source` names: that folder itself, or one of its files that is there until the end.

    Other than a folder it names a run, by the first characters of its id, or a registered model: `models:/name@alias` or
    `models:/name/version`. Raises UsageError for one that there is not, Failure if the store or the files cannot be read.
    """
    with found(source, root) as (folder, _):
        yield folder


@contextmanager
def found(source: str | Path, root: Path) -> Iterator[tuple[Path, tracking.Recorded | None]]:
    """As `folder_of`, and the run that made the model, if it was not a folder that was named."""
    if Path(source).exists() or not tracking.names_model(str(source)):
        yield Path(source), None
        return
    with tempfile.TemporaryDirectory(prefix="vqmoe-") as temporary:
        yield tracking.fetch(root, str(source), Path(temporary))


def generate(source: str | Path, root: Path, prompt: str, length: int, sampling: serving.Sampling, seed: int) -> None:
    """Print the prompt as the model reads it, and its continuation as it comes."""
    with folder_of(source, root) as folder:
        model = serving.load(folder)
    if not isinstance(model, serving.LanguageModel):
        raise UsageError(f"{source}: a {model.spec.kind}; name a language model, such as outputs/pretrain/vqmoe-s0")
    print(model.read(prompt), end="", flush=True)
    for text in model.generate(prompt, length, sampling, seed):
        print(text, end="", flush=True)
    print()


def classify(source: str | Path, root: Path, texts: Sequence[str], files: Sequence[Path], as_json: bool) -> None:
    """Print the label of each text, line of a text file or image and its probability; as JSON lines, with those of all labels."""
    with folder_of(source, root) as folder:
        model = serving.load(folder)
    if isinstance(model, serving.LanguageModel):
        raise UsageError(f"{source}: a language model; name a classifier, such as outputs/finetune/vqmoe-s0/era")
    if isinstance(model, serving.ImageClassifier) and texts:
        raise UsageError(f"{source}: labels images; name image files, and no --text")
    named = (("file", file) for file in files) if isinstance(model, serving.ImageClassifier) else _texts(texts, files)
    width = max(map(len, model.spec.labels))
    while some := list(islice(named, BATCH)):
        for (kind, given), share_L in zip(some, model.classify([given for _, given in some]), strict=True):
            print(_line(kind, given, model.spec.labels, share_L, width, as_json))


def default_model(params: Params, paths: Paths, stage: str) -> Path:
    """What a stage left of the first cell of the grid."""
    task = next(iter(params.data.tasks), None) if stage == "finetune" else None
    return paths.output(stage, Cell(params.grid.methods[0], params.grid.seeds[0], task))


def _texts(texts: Sequence[str], files: Sequence[Path]) -> Iterator[tuple[str, str]]:
    yield from (("text", text) for text in texts)
    for file in files:
        lines = sys.stdin if str(file) == "-" else read_text(file).splitlines()
        yield from (("text", line.rstrip("\n")) for line in lines if line.strip())


def _line(kind: str, given: Any, labels: Sequence[str], share_L: np.ndarray, width: int, as_json: bool) -> str:
    best = int(share_L.argmax())
    if as_json:
        shares = {label: round(float(share), 6) for label, share in zip(labels, share_L, strict=True)}
        return json.dumps({kind: str(given), "label": labels[best], "probabilities": shares}, ensure_ascii=False)
    shown = str(given) if kind == "file" or len(given) <= SHOWN else f"{given[: SHOWN - 3]}..."
    return f"{labels[best]:{width}}  {share_L[best]:.3f}  {shown}"
