"""Pre-train: train, validate, keep the best, score it once on test in each of its modes."""

from types import SimpleNamespace

from safetensors.numpy import save

from pipeline import ranks
from pipeline.files import output_folder, write_rows
from pipeline.models.transformer import Hidden
from pipeline.progress import Progress
from pipeline.training import checkpoint
from pipeline.training.loop import Log, fit
from pipeline.training.optim import adam
from pipeline.training.seeding import seed_everything
from pipeline.training.states import States
from pipeline.training.validation import RoutingHistory, RoutingTally
from stages import problems
from stages.paths import Cell, Paths


def run(params: SimpleNamespace, paths: Paths, cell: Cell, log: Log, states: States | None = None) -> dict:
    """Returns metrics: scores on valid, and on test in each mode of the method, size, FLOPs, load.

    units.safetensors holds in each mode the score of each unit of the test split: bits per token of a row of text, or 1 for an
    image whose label was right.
    """
    settings, problem = params.pretrain, problems.source(params, paths, cell)
    seed_everything(cell.seed, "pretrain")
    model = problem.fresh()
    mode, history = model.train_mode, RoutingHistory()

    def validate() -> dict[str, float]:
        tally = RoutingTally(model, keep=True)
        return problem.validate(model, mode, tally) | history.add(tally)

    fitted = fit(
        model,
        adam(model, settings.learning_rate, settings.beta2, settings.weight_decay),
        settings,
        objective=problem.objective(model, mode, settings.steps),
        validate=validate,
        score=problem.unit,
        log=log,
        label=f"pretrain {cell.name}",
        states=states,
        carried={"history": history},
    )
    if ranks.rank():
        return {}
    tally, tested = RoutingTally(model), {}
    with Progress(f"test {cell.name}", total=len(model.modes) * problem.test_tokens(), unit="token") as progress:

        def watch(hidden: Hidden) -> None:
            progress.advance(hidden.state_BTD[..., 0].numel())
            if not tested:  # routing is that of the training mode, which comes first
                tally(hidden)

        for scored in model.modes:
            tested[scored] = problem.test(model, scored, watch)
    metrics = {
        "best_step": fitted.best_step,
        "valid": {name: fitted.best[name] for name in tested[mode].metrics},
        "test": {
            name if scored == mode else f"{name}_{scored}": value
            for scored, test in tested.items()
            for name, value in test.metrics.items()
        },
        "routing": tally.summary(),
        "parameters": sum(p.numel() for p in model.parameters()),
        "flops_per_token": problem.flops(model, mode),
    }
    with output_folder(paths.output("pretrain", cell)) as folder:
        checkpoint.save(folder, model, problem.spec)
        problem.save(folder)
        write_rows(folder / "history.csv", fitted.history)
        units = {scored: test.score_U for scored, test in tested.items()} | tested[mode].groups
        (folder / "units.safetensors").write_bytes(save(units))
        write_rows(folder / "routing.csv", history.rows([row["step"] for row in fitted.history]))
    return metrics
