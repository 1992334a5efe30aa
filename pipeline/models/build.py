"""What a model is made of, as plain data, and the model made from it."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, field_serializer, field_validator
from torch import nn

from pipeline.config import ImageView, TextModel, TextView, VisionModel
from pipeline.errors import UsageError
from pipeline.models.heads import Classifier
from pipeline.models.transformer import Transformer
from pipeline.models.vit import Vit
from pipeline.moe.layer import SETTINGS
from pipeline.moe.routers.base import Settings


class Spec(BaseModel):
    """Everything needed to build a model; stored beside its weights and compared when they are loaded.

    The view is what is done to texts or images before the model reads them; None for a model of what is made up. A model of
    text has a vocabulary and `tokenizer`, the digest of the one whose ids it reads: other ids of as large a vocabulary mean
    other text. One of images has their channels and the length of their sides. Both kinds of classifiers have labels, and one
    of text a pooling and a dropout of its head.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["language-model", "classifier", "image-classifier"]
    method: str
    settings: Any
    model: TextModel | VisionModel
    view: TextView | ImageView | None = None
    vocabulary: int | None = None
    tokenizer: str | None = None
    channels: int | None = None
    size: int | None = None
    labels: tuple[str, ...] | None = None
    pooling: Literal["last", "mean"] | None = None
    head_dropout: float | None = None

    @field_validator("settings")
    @classmethod
    def _typed(cls, value: Any, info: Any) -> Settings:
        return SETTINGS[info.data["method"]].model_validate(value) if isinstance(value, dict) else value

    @field_serializer("settings")
    def _plain(self, value: Settings) -> dict[str, Any]:
        return value.model_dump()

    def plain(self) -> dict[str, Any]:
        """As JSON values, without what does not apply."""
        return self.model_dump(mode="json", exclude_none=True)


def build(spec: Spec) -> nn.Module:
    """A language model or a classifier, of text or images, with fresh weights from torch's generator.

    Raises UsageError if the vocabulary, which params alone do not know, is too small for model.cutoffs.
    """
    if spec.kind == "image-classifier":
        return Vit(spec.model, spec.method, spec.settings, spec.channels, spec.size, len(spec.labels))
    cutoffs = spec.model.cutoffs
    if cutoffs and cutoffs[-1] >= spec.vocabulary:
        raise UsageError(f"model.cutoffs ends with {cutoffs[-1]}: must lie below the vocabulary of {spec.vocabulary} tokens")
    backbone = Transformer(spec.model, spec.method, spec.settings, spec.vocabulary)
    if spec.kind == "language-model":
        return backbone
    return Classifier(backbone, len(spec.labels), spec.pooling, spec.head_dropout)
