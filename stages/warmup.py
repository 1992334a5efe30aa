"""Codebook warm-up on the fine-tuning domain, backbone frozen; a method with a router warms up its router instead."""

from types import SimpleNamespace

import torch
from torch import nn

from pipeline import ranks
from pipeline.files import output_folder, write_rows
from pipeline.training import checkpoint
from pipeline.training.loop import Log, fit
from pipeline.training.optim import adam
from pipeline.training.problems import Problem
from pipeline.training.seeding import seed_everything
from pipeline.training.states import States
from pipeline.training.validation import RoutingTally
from stages import problems
from stages.paths import Cell, Paths


def run(params: SimpleNamespace, paths: Paths, cell: Cell, log: Log, states: States | None = None) -> dict:
    """Returns metrics before and after on the domain's validation data: score, load, codebook.

    A warm-up that ends no better than it started is undone (`best_step` 0).
    """
    settings, problem = params.warmup, problems.domain(params, paths, cell)
    seed_everything(cell.seed, "warmup")
    model = problem.begin(paths.output("pretrain", cell))
    mode, unit = problem.backbone(model).infer_mode, problem.unit
    before, start = _measure(problem, model), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    _repair(problem, model)
    # What learns is what the mixture layers use in this mode: assignment and experts, the same for every method.
    model.requires_grad_(False)
    layers = problem.backbone(model).moe_layers
    learning = [parameter for layer in layers for parameter in (*layer.assignment_parameters(), *layer.experts.parameters())]
    for parameter in (*learning, *problem.head(model)):
        parameter.requires_grad_(True)
    fitted = fit(
        model,
        adam(model, settings.learning_rate, settings.beta2, settings.weight_decay),
        settings,
        objective=problem.objective(model, mode),
        validate=lambda: problem.validate(model, mode),
        score=unit,
        log=log,
        label=f"warmup {cell.name}",
        states=states,
    )
    if ranks.rank():
        return {}
    after, best_step = _measure(problem, model), fitted.best_step
    if after[unit] >= before[unit]:
        # What does not help is not kept: neither new codes nor training.
        model.load_state_dict(start)
        after, best_step = before, 0
    with output_folder(paths.output("warmup", cell)) as folder:
        checkpoint.save(folder, model, problem.spec)
        problem.save(folder)
        write_rows(folder / "history.csv", fitted.history)
    return {"best_step": best_step, "before": before, "after": after}


def _measure(problem: Problem, model: nn.Module) -> dict[str, float]:
    backbone = problem.backbone(model)
    tally = RoutingTally(backbone)
    return problem.validate(model, backbone.infer_mode, tally) | tally.summary()


def _repair(problem: Problem, model: nn.Module) -> None:
    """Move codes that the domain's states leave idle, first layer first: a layer's states depend on those below."""
    for layer in problem.backbone(model).moe_layers:
        if not hasattr(layer, "quantizer"):
            continue
        states: list[torch.Tensor] = []
        hook = layer.quantizer.register_forward_pre_hook(lambda module, inputs, states=states: states.append(inputs[0]))
        problem.show(model, problem.backbone(model).infer_mode)
        hook.remove()
        layer.quantizer.repair(torch.cat(states))
