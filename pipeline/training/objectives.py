"""What a training step minimises: a batch as a function of (seed, step), its loss and the loss's parts."""

import numpy as np
import torch
import torch.nn.functional as F

from pipeline.data.batches import Examples, example_batch, padded, stream_batch, token_batch
from pipeline.data.tokenizers import Unit
from pipeline.models.heads import Classifier
from pipeline.models.transformer import Transformer
from pipeline.moe.layer import Mode
from pipeline.training.loop import Objective
from pipeline.training.validation import nats, score


def language_objective(
    model: Transformer, tokens: np.ndarray, *, batch: int, seed: int, mode: Mode, unit: Unit, steps: int | None = None,
    noise: float = 0.0, consistency: float = 0.0,
) -> Objective:
    """Next-token cross-entropy plus the layers' auxiliary losses, on segments of the model's context length.

    They are random ones; for a model with memory those of contiguous streams, whose memory ends where they begin anew.
    `steps` is the length of a pre-training, over which routers follow their schedules; without it they follow none.
    """
    memory = None

    def objective(step: int):
        nonlocal memory
        if steps is not None:
            model.begin_step((step - 1) / steps)
        if model.memory:
            segment_BT, first = stream_batch(tokens, batch, model.context, seed, step)
            memory = None if first else memory
        else:
            segment_BT = token_batch(tokens, batch, model.context, seed, step)
        loss, hidden = nats(model, segment_BT, mode, memory)
        auxiliary = hidden.auxiliary()
        if noise:
            # A copy in which a share of what is read are other tokens of the batch; what is to be predicted stays.
            hit_BT = torch.rand(segment_BT[:, 1:].shape) < noise
            other_BT = segment_BT.flatten()[torch.randint(segment_BT.numel(), hit_BT.shape)]
            copy = model(torch.where(hit_BT, other_BT, segment_BT[:, :-1]), mode)
            if consistency:
                kept_N = ~hit_BT.flatten()
                auxiliary = auxiliary + consistency * sum(
                    F.kl_div(noisy.scores[kept_N].log_softmax(-1), clean.scores[kept_N].detach().softmax(-1), reduction="batchmean")
                    for noisy, clean in zip(copy.layers, hidden.layers, strict=True)
                    if noisy.scores is not None
                )
            else:
                noisy_loss = model.nats(copy.state_BTD, segment_BT[:, 1:]).mean()
                auxiliary = (auxiliary + copy.auxiliary()) / 2 + (noisy_loss - loss) / 2
        memory = hidden.memory(model.memory)
        return loss + auxiliary, {unit: score(loss, unit)} | hidden.losses()

    return objective


def classification_objective(
    model: Classifier, examples: Examples, *, batch: int, crop: int, seed: int, pad: int, mode: Mode, noise: float = 0.0
) -> Objective:
    """Cross-entropy of the label plus the layers' auxiliary losses, over shuffled epochs of the examples' random crops."""

    def objective(step: int):
        ids, labels_B = example_batch(examples, batch, crop, seed, step)
        if noise:
            pool = np.concatenate(ids)
            rng = np.random.default_rng([seed, step])
            ids = [np.where(rng.random(len(given)) < noise, rng.choice(pool, len(given)), given) for given in ids]
        scores_BL, hidden = model(*padded(ids, pad), mode)
        loss = F.cross_entropy(scores_BL, labels_B)
        return loss + hidden.auxiliary(), {"nats": loss} | hidden.losses()

    return objective
