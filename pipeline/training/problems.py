"""What a model is to learn: a loss, a validation and a test. Stages train and score a problem without knowing which it is.

Shapes: U units (rows of a text, passages, images), L labels.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.config import ImageTraining
from pipeline.data.batches import Examples, document_numbers, segment_starts
from pipeline.data.images import Images, channel_statistics, spaced_images
from pipeline.data.tokenizers import Tokenizer
from pipeline.models.build import Spec, build
from pipeline.models.flops import flops_per_patch, flops_per_token
from pipeline.models.heads import Classifier
from pipeline.models.transformer import Transformer
from pipeline.models.vit import Vit
from pipeline.moe.layer import Mode
from pipeline.training import checkpoint
from pipeline.training.loop import Objective
from pipeline.training.objectives import LanguageObjective, classification_objective, image_objective
from pipeline.training.validation import Watch, classify, classify_images, held_out, row_nats, score, score_tokens


class Scored(NamedTuple):
    """A test: metrics, a value of each unit by which runs are compared (U,), and tables by name.

    `groups_U` says which units were taken from the same thing, where that is known.
    """

    metrics: dict[str, float]
    score_U: np.ndarray
    groups_U: np.ndarray | None = None
    tables: Mapping[str, list[dict[str, Any]]] = {}

    @property
    def groups(self) -> dict[str, np.ndarray]:
        return {} if self.groups_U is None else {"groups": self.groups_U}


class Problem(Protocol):
    """`spec` describes the model, `unit` names the score that validation minimises, `device` is where models are put."""

    spec: Spec
    unit: str
    device: str

    def fresh(self) -> nn.Module:
        """A model with weights from torch's generator."""

    def begin(self, folder: Path) -> nn.Module:
        """A model that goes on from the one that the stage before left in a folder."""

    def backbone(self, model: nn.Module) -> Any:
        """What has the mixture layers and the modes."""

    def head(self, model: nn.Module) -> list[nn.Parameter]:
        """What a warm-up has to train beside the mixture layers, since it is new."""

    def objective(self, model: nn.Module, mode: Mode, steps: int | None = None) -> Objective:
        """Loss of a training step; `steps` is the length of a pre-training, whose schedules routers then follow."""

    def step_tokens(self) -> int:
        """How many tokens a training step reads."""

    def validate(self, model: nn.Module, mode: Mode, watch: Watch | None = None) -> dict[str, float]:
        """Scores on the validation split, of which `unit` is one."""

    def show(self, model: nn.Module, mode: Mode) -> None:
        """Pass some of the training data through the model."""

    def test_tokens(self) -> int:
        """How many tokens a test passes through the model."""

    def test(self, model: nn.Module, mode: Mode, watch: Watch | None = None) -> Scored:
        """Scores on the test split."""

    def flops(self, model: nn.Module, mode: Mode) -> float:
        """FLOPs of a forward pass, per token."""

    def save(self, folder: Path) -> None:
        """What one needs beside the model to use it."""


@dataclass(frozen=True)
class Language:
    """Next tokens of a text. Its units are rows of the test text, in bits per token; `documents` are the places of the first
    tokens of the test text's documents.
    """

    spec: Spec
    tokenizer: Tokenizer
    tokens: Mapping[str, np.ndarray]
    batch: int
    validate_tokens: int
    seed: int
    show_tokens: int = 0
    device: str = "cpu"
    documents: np.ndarray | None = None

    @property
    def unit(self) -> str:
        return self.tokenizer.unit

    def fresh(self) -> Transformer:
        return build(self.spec).to(self.device)

    def begin(self, folder: Path) -> Transformer:
        return checkpoint.load(folder, self.spec).to(self.device)

    def backbone(self, model: Transformer) -> Transformer:
        return model

    def head(self, model: Transformer) -> list[nn.Parameter]:
        return []

    def objective(self, model: Transformer, mode: Mode, steps: int | None = None) -> Objective:
        return LanguageObjective(
            model, self.tokens["train"], batch=self.batch, seed=self.seed, mode=mode, unit=self.unit, steps=steps
        )

    def step_tokens(self) -> int:
        return self.batch * self.spec.model.context

    def validate(self, model: Transformer, mode: Mode, watch: Watch | None = None) -> dict[str, float]:
        valid = held_out(model, self.tokens["valid"], self.validate_tokens)
        return {self.unit: score_tokens(model, valid, mode, self.unit, watch=watch)}

    def show(self, model: Transformer, mode: Mode) -> None:
        score_tokens(model, held_out(model, self.tokens["train"], self.show_tokens), mode, self.unit)

    def test_tokens(self) -> int:
        return len(self.tokens["test"])

    def test(self, model: Transformer, mode: Mode, watch: Watch | None = None) -> Scored:
        test, groups_U = self.tokens["test"], None
        # A long row, as of a model that remembers, is of many documents.
        if self.documents is not None and not model.evaluate_memory:
            groups_U = document_numbers(self.documents, segment_starts(test, model.evaluate_context))
        nats_U, count_U = row_nats(model, held_out(model, test), mode, watch=watch)
        bits_U = (nats_U / count_U / math.log(2)).numpy()
        return Scored({self.unit: score(nats_U.sum() / count_U.sum(), self.unit).item()}, bits_U, groups_U)

    def flops(self, model: Transformer, mode: Mode) -> float:
        test, length = self.tokens["test"], model.context
        return flops_per_token(model, mode, length, model.memory, targets=test[:: max(1, len(test) // length)])

    def save(self, folder: Path) -> None:
        self.tokenizer.save(folder / "tokenizer.json")


@dataclass(frozen=True)
class Passages:
    """Labels of texts. Its units are test passages: 1 where the label is right, else 0."""

    spec: Spec
    language: Spec
    tokenizer: Tokenizer
    examples: Mapping[str, Examples]
    groups_U: np.ndarray | None
    batch: int
    crop: int
    seed: int
    unit: str = "nats"
    device: str = "cpu"

    def fresh(self) -> Classifier:
        return build(self.spec).to(self.device)

    def begin(self, folder: Path) -> Classifier:
        model = build(self.spec)
        model.backbone.load_state_dict(checkpoint.load(folder, self.language).state_dict())
        return model.to(self.device)

    def backbone(self, model: Classifier) -> Transformer:
        return model.backbone

    def head(self, model: Classifier) -> list[nn.Parameter]:
        return [*model.features.parameters(), *model.scores.parameters()]

    def objective(self, model: Classifier, mode: Mode, steps: int | None = None) -> Objective:
        return classification_objective(
            model,
            self.examples["train"],
            batch=self.batch,
            crop=self.crop,
            seed=self.seed,
            pad=self.tokenizer.pad,
            mode=mode,
        )

    def step_tokens(self) -> int:
        return self.batch * self.crop

    def validate(self, model: Classifier, mode: Mode, watch: Watch | None = None) -> dict[str, float]:
        valid = self.examples["valid"]
        return label_scores(classify(model, valid.ids, self.tokenizer.pad, mode, watch), valid.labels)

    def test_tokens(self) -> int:
        return sum(map(len, self.examples["test"].ids))

    def test(self, model: Classifier, mode: Mode, watch: Watch | None = None) -> Scored:
        test = self.examples["test"]
        scores_UL = classify(model, test.ids, self.tokenizer.pad, mode, watch)
        return scored(scores_UL, test.labels, self.spec.labels, self.groups_U)

    def flops(self, model: Classifier, mode: Mode) -> float:
        return flops_per_token(model.backbone, mode, model.backbone.context)

    def save(self, folder: Path) -> None:
        self.tokenizer.save(folder / "tokenizer.json")


def scored(scores_UL: Tensor, labels_U: np.ndarray, names: tuple[str, ...], groups_U: np.ndarray | None = None) -> Scored:
    """A test of class scores, with the tables `confusion` and `classes`."""
    correct_U = (scores_UL.argmax(1).numpy() == labels_U).astype(np.float64)
    confusion, classes = _by_class(scores_UL, labels_U, names)
    return Scored(label_scores(scores_UL, labels_U), correct_U, groups_U, {"confusion": confusion, "classes": classes})


def label_scores(scores_UL: Tensor, labels_U: np.ndarray) -> dict[str, float]:
    """Mean cross-entropy, accuracy and macro-F1."""
    # Loading scikit-learn takes a second, which language models need not wait for.
    from sklearn.metrics import f1_score

    predicted = scores_UL.argmax(1).numpy()
    return {
        "nats": F.cross_entropy(scores_UL, torch.from_numpy(labels_U)).item(),
        "accuracy": float((predicted == labels_U).mean()),
        "macro_f1": float(f1_score(labels_U, predicted, average="macro")),
    }


def _by_class(scores_UL: Tensor, labels_U: np.ndarray, names: tuple[str, ...]) -> tuple[list[dict], list[dict]]:
    """The confusion matrix, a row per true label and a column per predicted one, and scores of each label."""
    from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

    given = {"y_true": labels_U, "y_pred": scores_UL.argmax(1).numpy(), "labels": range(len(names))}
    # No label is the empty text, so the head of the true labels' column is none of them.
    confusion = [
        {"": name} | dict(zip(names, row, strict=True)) for name, row in zip(names, confusion_matrix(**given), strict=True)
    ]
    scores = zip(*precision_recall_fscore_support(**given, zero_division=0), strict=True)
    columns = ("precision", "recall", "f1", "examples")
    return confusion, [{"label": name} | dict(zip(columns, row, strict=True)) for name, row in zip(names, scores, strict=True)]


@dataclass(frozen=True)
class Pictures:
    """Labels of images. Its units are test images: 1 where the label is right, else 0."""

    spec: Spec
    images: Mapping[str, Images]
    settings: ImageTraining
    seed: int
    show_images: int = 0
    unit: str = "nats"
    device: str = "cpu"

    def fresh(self) -> Vit:
        model = build(self.spec)
        model.normalise_by(*channel_statistics(self.images["train"]))
        return model.to(self.device)

    def begin(self, folder: Path) -> Vit:
        """With a new head, where the model there knows other labels."""
        labels = checkpoint.labels(folder)
        found = checkpoint.load(folder, self.spec.model_copy(update={"labels": labels}))
        if labels == self.spec.labels:
            return found.to(self.device)
        model = build(self.spec)
        model.load_backbone(found)
        return model.eval().to(self.device)

    def backbone(self, model: Vit) -> Vit:
        return model

    def head(self, model: Vit) -> list[nn.Parameter]:
        return list(model.head.parameters())

    def objective(self, model: Vit, mode: Mode, steps: int | None = None) -> Objective:
        return image_objective(model, self.images["train"], self.settings, seed=self.seed, mode=mode, steps=steps)

    def step_tokens(self) -> int:
        return self.settings.batch * self._patches()

    def validate(self, model: Vit, mode: Mode, watch: Watch | None = None) -> dict[str, float]:
        valid = spaced_images(self.images["valid"], self.settings.validate_images)
        return label_scores(classify_images(model, valid.pixels_NCHW, mode, watch), valid.labels_N)

    def show(self, model: Vit, mode: Mode) -> None:
        classify_images(model, spaced_images(self.images["train"], self.show_images).pixels_NCHW, mode)

    def test_tokens(self) -> int:
        return len(self.images["test"].labels_N) * (self._patches() + (self.spec.model.pooling == "class"))

    def test(self, model: Vit, mode: Mode, watch: Watch | None = None) -> Scored:
        test = self.images["test"]
        return scored(classify_images(model, test.pixels_NCHW, mode, watch), test.labels_N, self.spec.labels)

    def flops(self, model: Vit, mode: Mode) -> float:
        return flops_per_patch(model, mode)

    def save(self, folder: Path) -> None:
        """Nothing: the model knows its labels."""

    def _patches(self) -> int:
        return (self.spec.size // self.spec.model.patch) ** 2
