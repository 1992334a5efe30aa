"""Codebook warm-up on the fine-tuning domain, backbone frozen; a method with a router warms up its router instead."""

from types import SimpleNamespace

import numpy as np
import torch

from pipeline.data.corpora import join
from pipeline.data.tasks import read_task
from pipeline.data.tokenizers import Tokenizer, Unit
from pipeline.files import output_folder, write_rows
from pipeline.models.transformer import Transformer
from pipeline.training import checkpoint
from pipeline.training.loop import Log, fit
from pipeline.training.objectives import language_objective
from pipeline.training.optim import adam
from pipeline.training.seeding import seed_everything
from pipeline.training.validation import RoutingTally, held_out, score_tokens
from stages.paths import Cell, Paths
from stages.pretrain import language_model


def run(params: SimpleNamespace, paths: Paths, cell: Cell, log: Log) -> dict:
    """Returns metrics before and after on the domain's validation texts: bits per character or perplexity, load, codebook.

    A warm-up that ends no better than it started is undone (`best_step` 0).
    """
    settings = params.warmup
    tokenizer = Tokenizer.load(paths.data / "tokenizer.json")
    unit = tokenizer.unit
    task = read_task(paths.task(cell.task))
    tokens = {
        split: tokenizer.encode(join([example.text for example in task.splits[split]], params.data.view))
        for split in ("train", "valid")
    }
    seed_everything(cell.seed, "warmup")
    spec = language_model(params, cell, tokenizer)
    model = checkpoint.load(paths.output("pretrain", cell), spec)
    mode = model.infer_mode
    valid = held_out(model, tokens["valid"], settings.validate_tokens)
    before, start = _measure(model, valid, unit), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    _repair(model, held_out(model, tokens["train"], settings.kmeans_tokens))
    # What learns is what the mixture layers use in this mode: assignment and experts, the same for every method.
    model.requires_grad_(False)
    for layer in model.moe_layers:
        for parameter in (*layer.assignment_parameters(), *layer.experts.parameters()):
            parameter.requires_grad_(True)
    fitted = fit(
        model,
        adam(model, settings.learning_rate, settings.beta2),
        settings,
        objective=language_objective(model, tokens["train"], batch=settings.batch, seed=cell.seed, mode=mode, unit=unit),
        validate=lambda: {unit: score_tokens(model, valid, mode, unit)},
        score=unit,
        log=log,
        label=f"warmup {cell.name}",
    )
    after, best_step = _measure(model, valid, unit), fitted.best_step
    if after[unit] >= before[unit]:
        # What does not help is not kept: neither new codes nor training.
        model.load_state_dict(start)
        after, best_step = before, 0
    with output_folder(paths.output("warmup", cell)) as folder:
        checkpoint.save(folder, model, spec)
        tokenizer.save(folder / "tokenizer.json")
        write_rows(folder / "history.csv", fitted.history)
    return {"best_step": best_step, "before": before, "after": after}


def _measure(model: Transformer, valid: np.ndarray, unit: Unit) -> dict[str, float]:
    tally = RoutingTally(model)
    score = score_tokens(model, valid, model.infer_mode, unit, watch=tally)
    return {unit: score} | tally.summary()


def _repair(model: Transformer, texts: np.ndarray) -> None:
    """Move codes that the domain's states leave idle, first layer first: a layer's states depend on those below."""
    for layer in model.moe_layers:
        if not hasattr(layer, "quantizer"):
            continue
        states: list[torch.Tensor] = []
        hook = layer.quantizer.register_forward_pre_hook(lambda module, inputs, states=states: states.append(inputs[0]))
        score_tokens(model, texts, model.infer_mode, "bpc")
        hook.remove()
        layer.quantizer.repair(torch.cat(states))
