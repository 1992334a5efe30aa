"""What training and inference cost in each mode of a method on this machine: FLOPs, time and memory."""

from copy import deepcopy
from itertools import count
from types import SimpleNamespace

import numpy as np
import torch
from torch import nn

from pipeline.config import Training
from pipeline.data.batches import Examples, open_tokens, segments
from pipeline.data.tokenizers import Tokenizer
from pipeline.evaluation.compute import Work, measure, saving
from pipeline.models.build import build
from pipeline.models.flops import active_parameters, count_flops, flops_per_token
from pipeline.models.heads import Classifier
from pipeline.models.transformer import Transformer
from pipeline.training.loop import Log, Objective
from pipeline.training.objectives import classification_objective, language_objective
from pipeline.training.optim import adam
from pipeline.training.seeding import seed_everything
from stages.paths import Cell, Paths
from stages.pretrain import language_model

LABELS = 2


def run(params: SimpleNamespace, paths: Paths, cell: Cell, log: Log) -> dict:
    """Returns metrics: parameters, FLOPs per token of a forward pass, then what a step of pre-training (`train`), a step of
    fine-tuning and inference (`infer`) take in each mode, and the share of it that the mode of inference saves.

    Of those three FLOPs are all of a step, backward included. Weights are random, labels made up, batches as in the stages.
    """
    context = params.model.context
    tokenizer = Tokenizer.load(paths.data / "tokenizer.json")
    tokens = open_tokens(paths.data / "train.npy", tokenizer.size)
    seed_everything(cell.seed, "compute")
    model = build(language_model(params, cell, tokenizer))
    modes = model.modes[:2]
    sample = tokens[:: max(1, len(tokens) // context)]
    metrics = {
        "parameters": {
            "total": sum(parameter.numel() for parameter in model.parameters()),
            "active": {mode: active_parameters(model, mode) for mode in modes},
        },
        "flops_per_token": {mode: flops_per_token(model, mode, context, params.model.memory, targets=sample) for mode in modes},
    }
    works = _works(model, params, cell, tokens, tokenizer)
    flops = {name: count_flops(work) for name, work in works.items()}
    measured = measure(works, params.compute.repeats)
    language, passages = params.pretrain.batch * context, params.finetune.batch * params.finetune.crop
    sizes = {"train": language, "finetune": passages, "infer": language}
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


def _works(model: Transformer, params: SimpleNamespace, cell: Cell, tokens: np.ndarray, tokenizer: Tokenizer) -> dict[str, Work]:
    """`train`, `finetune` and `infer`, each in each mode, as `<what>/<mode>`."""
    pretrain, finetune = params.pretrain, params.finetune
    texts = {
        mode: language_objective(model, tokens, batch=pretrain.batch, seed=cell.seed, mode=mode, unit=tokenizer.unit)
        for mode in model.modes[:2]
    }
    optimizer = adam(model, pretrain.learning_rate, pretrain.beta2)
    # Codes start in the first step. Half-way through a router's schedule a number of experts that grows is at its mean.
    _training(model, optimizer, texts[model.train_mode], pretrain)()
    model.begin_step(0.5)
    classifier = Classifier(deepcopy(model), LABELS, finetune.pooling, finetune.head_dropout)
    for layer in classifier.backbone.moe_layers:
        layer.freeze_assignment()
    tuning = adam(classifier, finetune.learning_rate, finetune.beta2, finetune.weight_decay)
    crops = list(segments(tokens, finetune.crop, finetune.batch)[:, :-1])
    examples = Examples(crops, np.arange(len(crops)) % LABELS)
    works = {}
    for mode, text in texts.items():
        passages = classification_objective(
            classifier, examples, batch=finetune.batch, crop=finetune.crop, seed=cell.seed, pad=tokenizer.pad, mode=mode
        )
        works[f"train/{mode}"] = _training(model, optimizer, text, pretrain)
        works[f"finetune/{mode}"] = _training(classifier, tuning, passages, finetune)
        works[f"infer/{mode}"] = _inference(model, text)
    return works


def _training(model: nn.Module, optimizer: torch.optim.Optimizer, objective: Objective, training: Training) -> Work:
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
