"""The training loop of every stage: step, log, validate, keep the best."""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pipeline import ranks
from pipeline.config import Training
from pipeline.errors import Failure
from pipeline.progress import Progress
from pipeline.ranks import Objective
from pipeline.training.optim import learning_rate
from pipeline.training.seeding import random_state, set_random_state
from pipeline.training.states import Stateful, States

LOG_EVERY = 10

Log = Callable[[Mapping[str, float], int], None]


@dataclass
class Fitted:
    """The best validation, and the whole history: one row per validation, with the mean training values since the last."""

    best_step: int = 0
    best: dict[str, float] = field(default_factory=dict)
    history: list[dict[str, float]] = field(default_factory=list)


@ranks.training()
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
    states: States | None = None,
    carried: Mapping[str, Stateful] = {},
) -> Fitted:
    """Train for `training.steps` steps; the model ends with the weights of its best validation (lowest `score`).

    `objective(step)` returns the loss to minimise and its named parts. With `states` the training goes on from the newest of
    them, and its result is, to the bit, that of one which was never cut off; `carried` is what else changes from step to step.
    Processes that share the steps all end with the same model; what they log are means over their parts.
    Raises Failure when a loss or a validation is not finite.
    """
    seed, learn = torch.initial_seed(), ranks.replicated(model, objective)
    fitted, best_weights = Fitted(), {}
    sums: dict[str, float] = {}
    counts: dict[str, int] = {}
    unseen: dict[int, dict[str, Tensor]] = {}
    carried = {"model": model, "optimizer": _Moments(optimizer)} | carried
    carried |= {"objective": objective} if isinstance(objective, Stateful) else {}
    first = 1
    if states is not None and (state := states.newest()):
        for name, one in carried.items():
            one.load_state_dict(state[name])
        set_random_state(state["random"])
        fitted, best_weights, sums, counts = Fitted(**state["fitted"]), state["best_weights"], state["sums"], state["counts"]
        first = state["step"] + 1
    if ranks.agreed(torch.tensor(first)) != first:
        raise Failure(f"{label}: machines see other states of the training; run them in one folder that all of them mount")
    with Progress(label, training.steps, done=first - 1) as progress:
        for step in range(first, training.steps + 1):
            rate = learning_rate(training, step - 1)
            for group in optimizer.param_groups:
                group["lr"] = rate
            model.train()
            ranks.reseed(seed, step)
            loss, parts = learn(step)
            unseen[step] = {"loss": loss.detach()} | {name: part.detach() for name, part in parts.items()}
            optimizer.zero_grad()
            loss.backward()
            norm = nn.utils.clip_grad_norm_(model.parameters(), training.clip)
            optimizer.step()
            last = step == training.steps
            logs, validates = (last or step % every == 0 for every in (LOG_EVERY, training.validate_every))
            saves = states is not None and (last or bool(ranks.agreed(torch.tensor(states.due(step)))))
            # Reading a value from a GPU waits for all of its work: it is done for some steps at once.
            if loss.device.type != "cpu" and not (logs or validates or saves):
                continue
            progress.advance(len(unseen))
            for seen, values in _read(unseen):
                for name, value in values.items():
                    _check_finite(label, name, value, seen)
                    sums[name] = sums.get(name, 0.0) + value
                    counts[name] = counts.get(name, 0) + 1
            unseen.clear()
            if logs:
                log(
                    {f"train/{name}": value for name, value in values.items()}
                    | {"train/learning_rate": rate, "train/gradient_norm": norm.item()},
                    step,
                )
            progress.advance(0, loss=values["loss"])
            if validates:
                model.eval()
                valid = validate()
                _check_finite(label, f"validation {score}", valid[score], step)
                log({f"valid/{name}": value for name, value in valid.items()}, step)
                progress.advance(0, **{f"valid {score}": valid[score]})
                means = {f"train/{name}": sums[name] / counts[name] for name in sorted(sums)}
                fitted.history.append({"step": step} | means | {f"valid/{name}": value for name, value in valid.items()})
                sums.clear()
                counts.clear()
                if valid[score] < fitted.best.get(score, math.inf):
                    fitted.best_step, fitted.best = step, valid
                    best_weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
            if saves:
                state = {name: one.state_dict() for name, one in carried.items()} | {"random": random_state(), "step": step}
                state |= {"fitted": asdict(fitted), "best_weights": best_weights, "sums": sums, "counts": counts}
                states.save(step, state)
    model.load_state_dict(best_weights)
    model.eval()
    return fitted


class _Moments:
    """What an optimizer remembers of each parameter; its settings are those it is made with."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    def state_dict(self) -> dict[str, Any]:
        return {str(place): moments for place, moments in self.optimizer.state_dict()["state"].items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        known = {int(place): moments for place, moments in state.items()}
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": known})


def _read(unseen: Mapping[int, Mapping[str, Tensor]]) -> list[tuple[int, dict[str, float]]]:
    """Scalars of each step as numbers, means over ranks, waiting for a GPU once."""
    numbers_A = torch.stack([value.double() for values in unseen.values() for value in values.values()])
    numbers = iter(ranks.mean(numbers_A).tolist())
    return [(step, {name: next(numbers) for name in values}) for step, values in unseen.items()]


def _check_finite(label: str, name: str, value: float, step: int) -> None:
    if not math.isfinite(value):
        raise Failure(f"{label}: {name} is {value} at step {step}; lower learning_rate or clip, nothing was overwritten")
