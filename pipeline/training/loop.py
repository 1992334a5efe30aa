"""The training loop of every stage: step, log, validate, keep the best."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pipeline.config import Training
from pipeline.errors import Failure
from pipeline.progress import Progress
from pipeline.training.optim import learning_rate

LOG_EVERY = 10

Objective = Callable[[int], tuple[Tensor, Mapping[str, Tensor]]]
Log = Callable[[Mapping[str, float], int], None]


@dataclass(frozen=True)
class Fitted:
    """The best validation, and the whole history: one row per validation, with the mean training values since the last."""

    best_step: int
    best: dict[str, float]
    history: list[dict[str, float]]


def fit(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    training: Training,
    *,
    objective: Objective,
    validate: Callable[[], dict[str, float]],
    score: str,
    log: Log,
    label: str,
) -> Fitted:
    """Train for `training.steps` steps; the model ends with the weights of its best validation (lowest `score`).

    `objective(step)` returns the loss to minimise and its named parts. Raises Failure when a loss or a validation is not
    finite.
    """
    best_score, best_step, best, best_state = math.inf, 0, {}, {}
    history: list[dict[str, float]] = []
    sums: dict[str, float] = {}
    counts: dict[str, int] = {}
    with Progress(label, training.steps) as progress:
        for step in range(1, training.steps + 1):
            rate = learning_rate(training, step - 1)
            for group in optimizer.param_groups:
                group["lr"] = rate
            model.train()
            loss, parts = objective(step)
            values = {"loss": loss.item()} | {name: part.item() for name, part in parts.items()}
            for name, value in values.items():
                _check_finite(label, name, value, step)
                sums[name] = sums.get(name, 0.0) + value
                counts[name] = counts.get(name, 0) + 1
            optimizer.zero_grad()
            loss.backward()
            norm = nn.utils.clip_grad_norm_(model.parameters(), training.clip)
            optimizer.step()
            if step % LOG_EVERY == 0 or step == training.steps:
                log(
                    {f"train/{name}": value for name, value in values.items()}
                    | {"train/learning_rate": rate, "train/gradient_norm": norm.item()},
                    step,
                )
            progress.advance(loss=values["loss"])
            if step % training.validate_every == 0 or step == training.steps:
                model.eval()
                valid = validate()
                _check_finite(label, f"validation {score}", valid[score], step)
                log({f"valid/{name}": value for name, value in valid.items()}, step)
                progress.advance(0, **{f"valid {score}": valid[score]})
                means = {f"train/{name}": sums[name] / counts[name] for name in sorted(sums)}
                history.append({"step": step} | means | {f"valid/{name}": value for name, value in valid.items()})
                sums.clear()
                counts.clear()
                if valid[score] < best_score:
                    best_score, best_step, best = valid[score], step, valid
                    best_state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.load_state_dict(best_state)
    model.eval()
    return Fitted(best_step, best, history)


def _check_finite(label: str, name: str, value: float, step: int) -> None:
    if not math.isfinite(value):
        raise Failure(f"{label}: {name} is {value} at step {step}; lower learning_rate or clip, nothing was overwritten")
