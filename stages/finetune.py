"""Fine-tune the warmed-up backbone on the labelled task, in the mode it is used in at inference."""

from types import SimpleNamespace

from safetensors.numpy import save
from torch import nn

from pipeline import ranks
from pipeline.files import output_folder, write_rows
from pipeline.training import checkpoint
from pipeline.training.loop import Fitted, Log, fit
from pipeline.training.optim import adam
from pipeline.training.problems import Problem
from pipeline.training.seeding import seed_everything
from pipeline.training.states import States
from stages import problems
from stages.paths import Cell, Paths


def run(params: SimpleNamespace, paths: Paths, cell: Cell, log: Log, states: States | None = None) -> dict:
    """Returns accuracy and macro-F1 on test, also without pre-training, and FLOPs per token.

    units.safetensors holds for each example of the test split whether its label was right, and what it belongs to.
    """
    problem = problems.task(params, paths, cell)
    seed_everything(cell.seed, "finetune")
    model = problem.begin(paths.output("warmup", cell))
    for layer in problem.backbone(model).moe_layers:
        layer.freeze_assignment()
    fitted = _fit(problem, model, params, cell, log, states, "finetune")
    if params.finetune.scratch:
        seed_everything(cell.seed, "scratch")
        fresh = problem.fresh()
        _fit(problem, fresh, params, cell, log, states, "scratch")
    if ranks.rank():
        return {}
    mode = problem.backbone(model).infer_mode
    test = problem.test(model, mode)
    metrics = {
        "best_step": fitted.best_step,
        "valid": fitted.best,
        "test": test.metrics,
        "flops_per_token": problem.flops(model, mode),
    }
    if params.finetune.scratch:
        metrics["scratch"] = problem.test(fresh, mode).metrics
    with output_folder(paths.output("finetune", cell)) as folder:
        checkpoint.save(folder, model, problem.spec)
        problem.save(folder)
        write_rows(folder / "history.csv", fitted.history)
        (folder / "units.safetensors").write_bytes(save({"correct": test.score_U} | test.groups))
        for name, rows in test.tables.items():
            write_rows(folder / f"{name}.csv", rows)
    return metrics


def _fit(
    problem: Problem, model: nn.Module, params: SimpleNamespace, cell: Cell, log: Log, states: States | None, phase: str
) -> Fitted:
    settings, mode = params.finetune, problem.backbone(model).infer_mode
    prefix = "" if phase == "finetune" else f"{phase}/"
    return fit(
        model,
        adam(model, settings.learning_rate, settings.beta2, settings.weight_decay),
        settings,
        objective=problem.objective(model, mode),
        validate=lambda: problem.validate(model, mode),
        score=problem.unit,
        log=lambda values, step: log({prefix + name: value for name, value in values.items()}, step),
        label=f"{phase} {cell.name}",
        states=states and states.of(phase),
    )
