"""What training and inference cost in each mode of a method on this machine: FLOPs, time and memory."""

from collections.abc import Mapping
from itertools import count
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from pipeline.config import Training
from pipeline.evaluation.compute import Work, between, measure, saving
from pipeline.models.flops import active_parameters, count_flops
from pipeline.moe.chance import settled
from pipeline.training.loop import Log, Objective
from pipeline.training.optim import adam
from pipeline.training.problems import Problem
from pipeline.training.seeding import seed_everything
from stages import problems
from stages.paths import Cell, Paths


def run(params: SimpleNamespace, paths: Paths, cell: Cell, log: Log) -> dict:
    """Returns metrics: parameters, FLOPs per token of a forward pass, then what a step of pre-training (`train`), a step of
    fine-tuning and inference (`infer`) take in each mode, and the share of it that the mode of inference saves.

    Of those three FLOPs are all of a step, backward included. Weights are random, labels made up, batches as in the stages.
    What happens in some steps by chance counts in FLOPs and time as often as it does, in memory whole.
    """
    source = problems.source(params, paths, cell)
    seed_everything(cell.seed, "compute")
    model = source.fresh()
    modes = model.modes[:2]
    metrics = {
        "parameters": {
            "total": sum(parameter.numel() for parameter in model.parameters()),
            "active": {mode: active_parameters(model, mode) for mode in modes},
        },
        "flops_per_token": {mode: source.flops(model, mode) for mode in modes},
    }
    task = problems.made_up_task(params, cell, source)
    works = _works(params, source, model, task)
    steps = {name: _settled(work, False) for name, work in works.items()}
    chance = params.method.chance(len(model.moe_layers))
    if chance:
        steps |= {f"{name}, always": _settled(work, True) for name, work in works.items()}
    flops = {name: count_flops(step) for name, step in steps.items()}
    measured = measure(steps, params.compute.repeats)
    if chance:
        for name in works:
            flops[name] += chance * (flops[f"{name}, always"] - flops[name])
            measured[name] = between(measured[name], measured[f"{name}, always"], chance)
    sizes = {"train": source.step_tokens(), "finetune": task.step_tokens(), "infer": source.step_tokens()}
    for what, size in sizes.items():
        metrics[what] = {}
        for mode in modes:
            name = f"{what}/{mode}"
            seconds, shortest, longest = measured[name].seconds
            metrics[what][mode] = {
                "tokens_per_second": size / seconds,
                "low": size / longest,
                "high": size / shortest,
                "flops_per_token": flops[name] / size,
                "peak_memory_mib": measured[name].peak_memory_mib,
            }
    if len(modes) == 2:
        metrics["saving"] = {}
        for what in sizes:
            before, after = (f"{what}/{mode}" for mode in modes)
            seconds, low, high = saving(measured[after], measured[before])
            metrics["saving"][what] = {
                "flops": 1 - flops[after] / flops[before],
                "seconds": seconds,
                "low": low,
                "high": high,
            }
    return metrics


def _works(params: SimpleNamespace, source: Problem, model: nn.Module, task: Problem) -> dict[str, Work]:
    """`train`, `finetune` and `infer`, each in each mode, as `<what>/<mode>`."""
    pretrain, finetune = params.pretrain, params.finetune
    optimizer = adam(model, pretrain.learning_rate, pretrain.beta2, pretrain.weight_decay)
    # Codes start in the first step. Half-way through a router's schedule a number of experts that grows is at its mean.
    training_step(model, optimizer, source.objective(model, model.train_mode), pretrain)()
    model.begin_step(0.5)
    tuned = task.fresh()
    task.backbone(tuned).load_state_dict(model.state_dict())
    with settled(False):
        task.backbone(tuned).begin_step(0.5)
    for layer in task.backbone(tuned).moe_layers:
        layer.freeze_assignment()
    tuning = adam(tuned, finetune.learning_rate, finetune.beta2, finetune.weight_decay)
    works = {}
    for mode in model.modes[:2]:
        objective = source.objective(model, mode)
        works[f"train/{mode}"] = training_step(model, optimizer, _half_way(model, objective), pretrain)
        works[f"finetune/{mode}"] = training_step(tuned, tuning, task.objective(tuned, mode), finetune)
        works[f"infer/{mode}"] = _inference(model, objective)
    return works


def _settled(work: Work, outcome: bool) -> Work:
    def settle() -> None:
        with settled(outcome):
            work()

    return settle


def _half_way(model: nn.Module, objective: Objective) -> Objective:
    def begun(step: int) -> tuple[Tensor, Mapping[str, Tensor]]:
        model.begin_step(0.5)
        return objective(step)

    return begun


def training_step(model: nn.Module, optimizer: torch.optim.Optimizer, objective: Objective, training: Training) -> Work:
    """One step of `fit` per call."""
    steps = count(1)

    def step() -> None:
        model.train()
        loss, _ = objective(next(steps))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), training.clip)
        optimizer.step()

    return step


def _inference(model: nn.Module, objective: Objective) -> Work:
    steps = count(1)

    @torch.no_grad()
    def score() -> None:
        model.eval()
        objective(next(steps))

    return score
