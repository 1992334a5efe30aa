"""What the stages of an experiment train: text or images, by `data.view`."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from pipeline.config import ImageTraining
from pipeline.data.batches import Examples, encode_examples, open_documents, open_tokens, segments, spaced
from pipeline.data.corpora import SPLITS, join
from pipeline.data.images import ImageSet, open_set
from pipeline.data.tasks import Task, groups, read_task
from pipeline.data.tokenizers import Tokenizer
from pipeline.models.build import Spec
from pipeline.training.problems import Language, Passages, Pictures, Problem
from stages.paths import Cell, Paths, of_images


def source(params: SimpleNamespace, paths: Paths, cell: Cell) -> Problem:
    """What is pre-trained."""
    if of_images(params.data.view):
        return _pictures(params, params.pretrain, paths.source, cell)
    tokenizer = Tokenizer.load(paths.source / "tokenizer.json")
    return Language(
        language_model(params, cell, tokenizer),
        tokenizer,
        {split: open_tokens(paths.source / f"{split}.npy", tokenizer.size) for split in SPLITS},
        params.pretrain.batch,
        params.pretrain.validate_tokens,
        cell.seed,
        device=params.machine.device,
        documents=open_documents(paths.source / "test.documents.npy"),
    )


def domain(params: SimpleNamespace, paths: Paths, cell: Cell) -> Problem:
    """What the warm-up on a task's data trains: the next tokens of its texts, or the labels of its images."""
    if of_images(params.data.view):
        return _pictures(params, params.warmup, paths.task(cell.task), cell, params.warmup.kmeans_images)
    tokenizer, task = Tokenizer.load(paths.output("pretrain", cell) / "tokenizer.json"), read_task(paths.task(cell.task))
    tokens = {
        split: tokenizer.encode(join([example.text for example in task.splits[split]], params.data.view))
        for split in ("train", "valid")
    }
    settings = params.warmup
    return Language(
        language_model(params, cell, tokenizer),
        tokenizer,
        tokens,
        settings.batch,
        settings.validate_tokens,
        cell.seed,
        settings.kmeans_tokens,
        params.machine.device,
    )


def task(params: SimpleNamespace, paths: Paths, cell: Cell) -> Problem:
    """What is fine-tuned."""
    if of_images(params.data.view):
        return _pictures(params, params.finetune, paths.task(cell.task), cell)
    tokenizer, settings = Tokenizer.load(paths.output("warmup", cell) / "tokenizer.json"), params.finetune
    task = read_task(paths.task(cell.task))
    chosen = task.splits | {"valid": spaced(task.splits["valid"], settings.validate_passages)}
    examples = {
        # Training crops passages anew in every batch; scores are those of a passage's start.
        split: encode_examples(
            passages, task.labels, tokenizer, params.data.view, None if split == "train" else params.model.context
        )
        for split, passages in chosen.items()
    }
    return Passages(
        classifier(params, cell, tokenizer, task),
        language_model(params, cell, tokenizer),
        tokenizer,
        examples,
        groups(task.splits["test"]).get("groups"),
        settings.batch,
        settings.crop,
        cell.seed,
        device=params.machine.device,
    )


def made_up_task(params: SimpleNamespace, cell: Cell, source: Problem) -> Problem:
    """A task as costly as any: two labels, of stretches of what is pre-trained on; of images that themselves."""
    settings = params.finetune
    if isinstance(source, Pictures):
        return dataclasses.replace(source, settings=settings)
    crops = list(segments(source.tokens["train"], settings.crop, settings.batch)[:, :-1])
    return Passages(
        classifier(params, cell, source.tokenizer, Task(("a", "b"), {})),
        source.spec,
        source.tokenizer,
        {"train": Examples(crops, np.arange(len(crops)) % 2)},
        None,
        settings.batch,
        settings.crop,
        cell.seed,
        device=params.machine.device,
    )


def _pictures(params: SimpleNamespace, settings: ImageTraining, folder: Path, cell: Cell, show: int = 0) -> Pictures:
    found = open_set(folder)
    return Pictures(image_classifier(params, cell, found), found.splits, settings, cell.seed, show, device=params.machine.device)


def image_classifier(params: SimpleNamespace, cell: Cell, found: ImageSet) -> Spec:
    """The description of this experiment's classifier of a set of images."""
    _, channels, size, _ = found.splits["train"].pixels_NCHW.shape
    return Spec(
        kind="image-classifier",
        method=cell.method,
        settings=params.method,
        model=params.model,
        view=params.data.view,
        channels=channels,
        size=size,
        labels=found.classes,
    )


def language_model(params: SimpleNamespace, cell: Cell, tokenizer: Tokenizer) -> Spec:
    """The description of this experiment's language model."""
    return Spec(
        kind="language-model",
        method=cell.method,
        settings=params.method,
        model=params.model,
        view=params.data.view,
        vocabulary=tokenizer.size,
        tokenizer=tokenizer.digest,
    )


def classifier(params: SimpleNamespace, cell: Cell, tokenizer: Tokenizer, task: Task) -> Spec:
    """The description of this experiment's classifier of a task."""
    spec = language_model(params, cell, tokenizer)
    head = {"labels": task.labels, "pooling": params.finetune.pooling, "head_dropout": params.finetune.head_dropout}
    return spec.model_copy(update={"kind": "classifier"} | head)
