"""Use a trained model from the command line: go on with a text, label texts or images."""

import json
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from pipeline import serving, tracking
from pipeline.config import Params
from pipeline.data import archives, tables
from pipeline.errors import Failure, UsageError, nearest, printable
from pipeline.files import nearest_path
from stages.paths import Cell, Paths

# Texts or images at a time, so that there may be more of them than memory.
BATCH = 64
SHOWN = 60


@contextmanager
def folder_of(source: str | Path, root: Path) -> Iterator[Path]:
    """The folder of the model that `source` names: that folder itself, or one of its files that is there until the end.

    Other than a folder it names a run, by the first characters of its id, or a registered model: `models:/name@alias` or
    `models:/name/version`. Raises UsageError for one of these that there is not, Failure for a folder that is not there and if
    the store or the files cannot be read.
    """
    with found(source, root) as (folder, _):
        yield folder


@contextmanager
def found(source: str | Path, root: Path) -> Iterator[tuple[Path, tracking.Recorded | None]]:
    """As `folder_of`, and the run that made the model, if it was not a folder that was named."""
    if os.path.exists(source):
        yield Path(source), None
        return
    if not tracking.names_model(str(source)):
        known = [str(file.parent.relative_to(root)) for file in (root / "outputs").rglob("model.json")]
        raise Failure(
            f"{source}: no such folder, and no run id or registered model; name a folder with model.json, such as "
            "outputs/pretrain/vqmoe-s0, the first characters of a run id, or models:/name@alias"
            f"{nearest(str(source), known)}"
        )
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
    """Print the label of each text, line of a text file or image and its probability; as JSON lines, with those of all labels.

    One line for each, in their order: where the model has nothing to read, as in a blank line, there is no label (`-`, null).
    Raises Failure for a file that cannot be read, after what comes before it, and, in the end, for files without a line.
    """
    # Before the first label is out.
    for file in files:
        if str(file) == "-" and sys.stdin is None:
            raise Failure("-: standard input is closed; give it texts, or name files")
        if str(file) != "-" and not os.path.exists(file):
            raise Failure(f"{file}: not found{nearest_path(file, Path())}")
    with folder_of(source, root) as folder:
        model = serving.load(folder)
    if isinstance(model, serving.LanguageModel):
        raise UsageError(f"{source}: a language model; name a classifier, such as outputs/finetune/vqmoe-s0/era")
    if isinstance(model, serving.ImageClassifier) and texts:
        raise UsageError(f"{source}: labels images; name image files, and no --text")
    images, empty = isinstance(model, serving.ImageClassifier), []
    named = (("file", file) for file in files) if images else _texts(texts, files, empty)
    width = max(len(printable(label)) for label in model.spec.labels)
    for some in _batches(named):
        for (kind, given), share_L in zip(some, _shares(model, [given for _, given in some]), strict=True):
            known_L = share_L if images or model.reads(given) else None
            print(_line(kind, given, model.spec.labels, known_L, width, as_json))
    if empty:
        raise Failure(f"{', '.join(empty)}: empty; nothing to label")


def default_model(params: Params, paths: Paths, stage: str) -> Path:
    """What a stage left of the first cell of the grid. Raises Failure if it left nothing yet."""
    task = next(iter(params.data.tasks), None) if stage == "finetune" else None
    folder = paths.output(stage, Cell(params.grid.methods[0], params.grid.seeds[0], task))
    if not folder.exists():
        raise Failure(f"{folder}: not found; run `dvc repro`, or name a model by --model")
    return folder


def _texts(texts: Sequence[str], files: Sequence[Path], empty: list[str]) -> Iterator[tuple[str, str]]:
    """Texts, then every line of the files; a file that has none is put into `empty`."""
    yield from (("text", text) for text in texts)
    for file in files:
        # Not the text of standard input, whose lines would end elsewhere.
        given = archives.decoded(iter(sys.stdin.buffer.read1, b""), "-") if str(file) == "-" else tables.texts(file)
        some = False
        for line in archives.lines(given):
            some = True
            yield "text", line.removesuffix("\r")
        if not some:
            empty.append(str(file))


def _batches(given: Iterable[Any]) -> Iterator[list[Any]]:
    """What is given, some at a time; what came before a Failure is given out before that is raised."""
    some: list[Any] = []
    try:
        for one in given:
            some.append(one)
            if len(some) == BATCH:
                yield some
                some = []
    except Failure:
        yield some
        raise
    yield some


def _shares(model: serving.TextClassifier | serving.ImageClassifier, given: Sequence[Any]) -> Iterator[np.ndarray]:
    """Probabilities of each, also of images before one that cannot be read, for which Failure is raised."""
    try:
        yield from model.classify(given)
    except Failure:
        if len(given) == 1:
            raise
        for one in given:
            yield from model.classify([one])


def _line(kind: str, given: Any, labels: Sequence[str], share_L: np.ndarray | None, width: int, as_json: bool) -> str:
    label, share, shares = None, "-", None
    if share_L is not None:
        label, share = labels[share_L.argmax()], f"{share_L.max():.3f}"
        shares = {label: round(float(share), 6) for label, share in zip(labels, share_L, strict=True)}
    if as_json:
        return json.dumps({kind: str(given), "label": label, "probabilities": shares})
    # One line, whatever a label, a text or the name of a file has in it.
    shown = printable(str(given) if kind == "file" else " ".join(given.split()))
    shown = shown if kind == "file" or len(shown) <= SHOWN else f"{shown[: SHOWN - 3]}..."
    return f"{printable(label or '-'):{width}}  {share:5}  {shown}".rstrip()
