"""What a training step minimises: a batch as a function of (seed, step), its loss and the loss's parts.

Where processes share a step, each takes its part of the batch.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from pipeline import ranks
from pipeline.config import ImageTraining
from pipeline.data.batches import Examples, example_batch, padded, stream_batch, token_batch
from pipeline.data.images import Images, image_batch
from pipeline.data.tokenizers import Unit
from pipeline.models.heads import Classifier
from pipeline.models.transformer import Transformer
from pipeline.models.vit import Vit
from pipeline.moe.layer import Mode
from pipeline.training.loop import Objective
from pipeline.training.validation import nats, score


class LanguageObjective:
    """Next-token cross-entropy plus the layers' auxiliary losses, on segments of the model's context length.

    They are random ones; for a model with memory those of contiguous streams, whose memory ends where they begin anew.
    `steps` is the length of a pre-training, over which routers follow their schedules; without it they follow none.
    """

    def __init__(
        self, model: Transformer, tokens: np.ndarray, *, batch: int, seed: int, mode: Mode, unit: Unit, steps: int | None = None
    ) -> None:
        self.model, self.tokens, self.batch, self.seed = model, tokens, batch, seed
        self.mode, self.unit, self.steps = mode, unit, steps
        self._memory: list[Tensor] | None = None

    def __call__(self, step: int) -> tuple[Tensor, Mapping[str, Tensor]]:
        model, part = self.model, ranks.part(self.batch)
        if self.steps is not None:
            model.begin_step((step - 1) / self.steps)
        if model.memory:
            segment_BT, first = stream_batch(self.tokens, self.batch, model.context, self.seed, step, part)
            self._memory = None if first else self._memory
        else:
            segment_BT = token_batch(self.tokens, self.batch, model.context, self.seed, step, part)
        loss, hidden = nats(model, segment_BT, self.mode, self._memory)
        self._memory = hidden.memory(model.memory)
        return loss + hidden.auxiliary(), {self.unit: score(loss, self.unit)} | hidden.losses()

    def state_dict(self) -> dict[str, Any]:
        return {"memory": self._memory and [ranks.gathered(seen_BSD) for seen_BSD in self._memory]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        memory = state["memory"]
        part = ranks.part(self.batch)
        self._memory = memory and [seen_BSD[part].to(self.model.device) for seen_BSD in memory]


def classification_objective(
    model: Classifier, examples: Examples, *, batch: int, crop: int, seed: int, pad: int, mode: Mode
) -> Objective:
    """Cross-entropy of the label plus the layers' auxiliary losses, over shuffled epochs of the examples' random crops."""

    def objective(step: int):
        ids, labels_B = example_batch(examples, batch, crop, seed, step, ranks.part(batch))
        scores_BL, hidden = model(*padded(ids, pad), mode)
        loss = F.cross_entropy(scores_BL, labels_B.to(scores_BL.device))
        return loss + hidden.auxiliary(), {"nats": loss} | hidden.losses()

    return objective


def image_objective(
    model: Vit, images: Images, settings: ImageTraining, *, seed: int, mode: Mode, steps: int | None = None
) -> Objective:
    """Cross-entropy of softened labels plus the layers' auxiliary losses, over shuffled epochs of varied images.

    `steps` as in `LanguageObjective`.
    """

    def objective(step: int):
        if steps is not None:
            model.begin_step((step - 1) / steps)
        part = ranks.part(settings.batch)
        pixels_BCHW, labels_B = image_batch(images, settings.batch, seed, step, settings.pad, settings.flip, part)
        scores_BL, hidden = model(pixels_BCHW, mode)
        loss = F.cross_entropy(scores_BL, labels_B.to(scores_BL.device), label_smoothing=settings.smoothing)
        return loss + hidden.auxiliary(), {"nats": loss} | hidden.losses()

    return objective
