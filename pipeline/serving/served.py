"""A trained model and what it needs to read and write: the folder that a stage wrote.

    from pathlib import Path
    from pipeline.serving import load

    load(Path("outputs/finetune/vqmoe-s0/era")).classify(["A text.", "Another."])

Shapes: P texts or images, L labels, V vocabulary.
"""

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pipeline.data.corpora import view
from pipeline.data.tokenizers import Tokenizer
from pipeline.errors import Failure, UsageError
from pipeline.models.build import Spec
from pipeline.models.heads import Classifier
from pipeline.models.transformer import Transformer
from pipeline.models.vit import Vit
from pipeline.training import checkpoint
from pipeline.training.validation import classify, classify_images

# Models that an error names.
SHOWN = 4


@dataclass(frozen=True)
class Sampling:
    """How a next token is drawn.

    Scores are divided by `temperature`, 0 being the most likely token always; then only the fewest tokens stay that have at least
    `top_p` of the probability together (nucleus sampling, Holtzman et al. 2020).
    """

    temperature: float = 1.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise UsageError(f"temperature is {self.temperature}: must be 0 or more")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top-p is {self.top_p}: must be above 0 and at most 1")

    def draw(self, score_V: Tensor, generator: torch.Generator) -> int:
        """An id, from log-probabilities."""
        if self.temperature == 0:
            return int(score_V.argmax())
        # The highest becomes 0, and float64 has whatever the options may be: no temperature is too low to divide by, or too high.
        score_V = score_V.double()
        share_V, id_V = ((score_V - score_V.max()) / self.temperature).softmax(0).sort(descending=True, stable=True)
        # The first always stays, and whatever those before it leave short of top_p.
        share_V[share_V.cumsum(0) - share_V >= self.top_p] = 0
        # Random numbers of float32, with which a seed has given its text since the first version.
        return int(id_V[torch.multinomial(share_V.float(), 1, generator=generator)])


@dataclass(frozen=True)
class LanguageModel:
    """A model of text that goes on where a text ends."""

    spec: Spec
    model: Transformer
    tokenizer: Tokenizer

    def generate(self, prompt: str, length: int, sampling: Sampling, seed: int) -> Iterator[str]:
        """Text of `length` more tokens as it is made; the same seed on the same machine gives the same text.

        The model sees the last `context` tokens of what there is.
        """
        ids = self.tokenizer.encode_some(self.read(prompt)).tolist()
        generator, decoded = torch.Generator().manual_seed(seed), _Decoded(self.tokenizer, ids)
        for _ in range(length):
            ids.append(sampling.draw(self._next(ids), generator))
            yield decoded.add(ids[-1])
        yield decoded.rest()

    def read(self, prompt: str) -> str:
        """A prompt as training saw texts, in its view; a blank at its end ends a word.

        Raises UsageError if the view leaves nothing of it, though it is not blank.
        """
        seen = seen_by(self.spec, prompt, f"prompt '{prompt}'") if prompt.strip() else view(prompt, self.spec.view)
        return f"{seen} " if self.spec.view == "text27" and seen and prompt[-1].isspace() else seen

    @torch.no_grad()
    def _next(self, ids: Sequence[int]) -> Tensor:
        seen_1T = torch.tensor([ids[-self.model.context :]], dtype=torch.long)
        state_1D = self.model(seen_1T, self.model.infer_mode).state_BTD[:, -1]
        score_V = self.model.next_token(state_1D)[0].cpu()
        score_V[self.tokenizer.pad] = -torch.inf
        return score_V


@dataclass(frozen=True)
class TextClassifier:
    """A model that labels texts."""

    spec: Spec
    model: Classifier
    tokenizer: Tokenizer

    def classify(self, texts: Sequence[str]) -> np.ndarray:
        """Probabilities (P, L) of `spec.labels`, from the first `context` tokens of each text."""
        if not texts:
            return np.empty((0, len(self.spec.labels)), dtype=np.float32)
        ids = [self.tokenizer.encode_some(view(text, self.spec.view))[: self.model.backbone.context] for text in texts]
        return classify(self.model, ids, self.tokenizer.pad, self.model.backbone.infer_mode).softmax(1).numpy()

    def reads(self, text: str) -> bool:
        """Whether the view of training leaves anything of a text but blanks."""
        return bool(view(text, self.spec.view).strip())


@dataclass(frozen=True)
class ImageClassifier:
    """A model that labels images."""

    spec: Spec
    model: Vit

    def classify(self, files: Sequence[Path]) -> np.ndarray:
        """Probabilities (P, L) of `spec.labels` of image files, brought to the size and channels of training."""
        # Loads torchvision, which texts need not wait for.
        from pipeline.data.image_decode import read_image

        if not files:
            return np.empty((0, len(self.spec.labels)), dtype=np.float32)
        pixels_PCHW = np.stack([read_image(file, self.spec.view, self.spec.size) for file in files])
        return classify_images(self.model, pixels_PCHW, self.model.infer_mode).softmax(1).numpy()


def seen_by(spec: Spec, text: str, what: str) -> str:
    """A text in the view of a model. Raises UsageError, which begins with what it is, if that leaves nothing of it."""
    seen = view(text, spec.view)
    if seen:
        return seen
    raise UsageError(
        f"{what}: nothing of it is left in the view of this model ({spec.view}: letters a-z, and digits spelled out); give it a "
        "letter or a digit"
    )


Served = LanguageModel | TextClassifier | ImageClassifier


def load(folder: Path, device: str = "cpu") -> Served:
    """The model in `folder`, ready to use. Raises Failure in one line if a file is missing, damaged or of an older version."""
    if not os.path.isdir(folder):
        raise Failure(f"{folder}: no such folder; name one that has model.json, such as outputs/pretrain/vqmoe-s0")
    if not os.path.exists(folder / checkpoint.DESCRIPTION):
        # Such as what a stage left of all tasks.
        below = [file.parent for depth in ("*", "*/*") for file in folder.glob(f"{depth}/{checkpoint.DESCRIPTION}")]
        if below:
            others = " and others" if len(below) > SHOWN else ""
            raise Failure(
                f"{folder / checkpoint.DESCRIPTION}: not found; name one of its models: "
                f"{', '.join(map(str, sorted(below)[:SHOWN]))}{others}"
            )
    model, spec = checkpoint.open_model(folder)
    model = model.to(device)
    if spec.kind == "image-classifier":
        return ImageClassifier(spec, model)
    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    if tokenizer.digest != spec.tokenizer:
        raise Failure(f"{folder / 'tokenizer.json'}: not the tokenizer that the model was trained with; {checkpoint.REMEDY}")
    return (LanguageModel if spec.kind == "language-model" else TextClassifier)(spec, model, tokenizer)


class _Decoded:
    """Ids to text one after another. What is out stays as it is, so a character waits until its last byte is there."""

    # Of what was before, which decides whether a blank comes first.
    BEFORE = 8

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int]) -> None:
        self._tokenizer, self._ids = tokenizer, list(before[-self.BEFORE :])
        self._written = self._text()

    def add(self, one: int) -> str:
        self._ids.append(one)
        text = self._text()
        whole = text.rstrip("\ufffd")
        if len(whole) <= len(self._written):
            return ""
        new, self._written = whole[len(self._written) :], whole
        if whole == text:
            # Nothing waits, so that what has long been out need not be read again.
            self._ids = self._ids[-self.BEFORE :]
            self._written = self._text()
        return new

    def rest(self) -> str:
        return self._text()[len(self._written) :]

    def _text(self) -> str:
        return self._tokenizer.decode(np.array(self._ids))
