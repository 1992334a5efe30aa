"""Use a trained model from the command line: go on with a text, label texts or images."""

import json
import sys
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from pipeline import serving
from pipeline.config import Params
from pipeline.data.corpora import read_text
from pipeline.errors import UsageError
from stages.paths import Cell, Paths

# Texts or images at a time, so that there may be more of them than memory.
BATCH = 64
SHOWN = 60


def generate(folder: Path, prompt: str, length: int, sampling: serving.Sampling, seed: int) -> None:
    """Print the prompt as the model reads it, and its continuation as it comes."""
    model = serving.load(folder)
    if not isinstance(model, serving.LanguageModel):
        raise UsageError(f"{folder}: a {model.spec.kind}; name a language model, such as outputs/pretrain/vqmoe-s0")
    print(model.read(prompt), end="", flush=True)
    for text in model.generate(prompt, length, sampling, seed):
        print(text, end="", flush=True)
    print()


def classify(folder: Path, texts: Sequence[str], files: Sequence[Path], as_json: bool) -> None:
    """Print the label of each text, line of a text file or image and its probability; as JSON lines, with those of all labels."""
    model = serving.load(folder)
    if isinstance(model, serving.LanguageModel):
        raise UsageError(f"{folder}: a language model; name a classifier, such as outputs/finetune/vqmoe-s0/era")
    if isinstance(model, serving.ImageClassifier) and texts:
        raise UsageError(f"{folder}: labels images; name image files, and no --text")
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
