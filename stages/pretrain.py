"""Pre-train the language model: train, validate, keep the best, score it once on test."""

import math
from types import SimpleNamespace

from safetensors.numpy import save_file

from pipeline.data.batches import open_tokens
from pipeline.data.tokenizers import Tokenizer
from pipeline.files import output_folder, write_rows
from pipeline.models.build import Spec, build
from pipeline.models.flops import flops_per_token
from pipeline.models.transformer import Hidden
from pipeline.progress import Progress
from pipeline.training import checkpoint
from pipeline.training.loop import Log, fit
from pipeline.training.objectives import language_objective
from pipeline.training.optim import adam
from pipeline.training.seeding import seed_everything
from pipeline.training.validation import RoutingHistory, RoutingTally, held_out, row_nats, score, score_tokens
from stages.paths import Cell, Paths


def language_model(params: SimpleNamespace, cell: Cell, tokenizer: Tokenizer) -> Spec:
    """The description of this experiment's language model, which `warmup` and `robustness` expect to find."""
    return Spec(
        kind="language-model",
        method=cell.method,
        settings=params.method,
        model=params.model,
        vocabulary=tokenizer.size,
        tokenizer=tokenizer.digest,
    )


def run(params: SimpleNamespace, paths: Paths, cell: Cell, log: Log) -> dict:
    """Returns metrics: bits per character or perplexity on valid and test in each mode of the method, size, FLOPs, load.

    units.safetensors holds the bits per token of each row of the test text in each mode.
    """
    context, settings = params.model.context, params.pretrain
    tokenizer = Tokenizer.load(paths.data / "tokenizer.json")
    unit = tokenizer.unit
    tokens = {split: open_tokens(paths.data / f"{split}.npy", tokenizer.size) for split in ("train", "valid", "test")}
    spec = language_model(params, cell, tokenizer)
    seed_everything(cell.seed, "pretrain")
    model = build(spec)
    mode = model.train_mode
    valid, test = held_out(model, tokens["valid"], settings.validate_tokens), held_out(model, tokens["test"])
    history = RoutingHistory()

    def validate() -> dict[str, float]:
        tally = RoutingTally(model, keep=True)
        return {unit: score_tokens(model, valid, mode, unit, watch=tally)} | history.add(tally)

    fitted = fit(
        model,
        adam(model, settings.learning_rate, settings.beta2),
        settings,
        objective=language_objective(
            model, tokens["train"], batch=settings.batch, seed=cell.seed, mode=mode, unit=unit, steps=settings.steps
        ),
        validate=validate,
        score=unit,
        log=log,
        label=f"pretrain {cell.name}",
    )
    tally, scores, units = RoutingTally(model), {}, {}
    names = {scored: unit if scored == mode else f"{unit}_{scored}" for scored in model.modes}
    with Progress(f"test {cell.name}", total=len(names) * test[:, 1:].size, unit="token") as progress:

        def watch(hidden: Hidden) -> None:
            progress.advance(hidden.state_BTD[..., 0].numel())
            if not scores:  # routing is that of the training mode, which comes first
                tally(hidden)

        for scored, name in names.items():
            nats_S, count_S = row_nats(model, test, scored, watch=watch)
            scores[name] = score(nats_S.sum() / count_S.sum(), unit).item()
            units[scored] = (nats_S / count_S / math.log(2)).numpy()
    sample = tokens["test"][:: max(1, len(tokens["test"]) // context)]
    metrics = {
        "best_step": fitted.best_step,
        "valid": {unit: fitted.best[unit]},
        "test": scores,
        "routing": tally.summary(),
        "parameters": sum(p.numel() for p in model.parameters()),
        "flops_per_token": flops_per_token(model, mode, context, params.model.memory, targets=sample),
    }
    with output_folder(paths.output("pretrain", cell)) as folder:
        checkpoint.save(folder, model, spec)
        tokenizer.save(folder / "tokenizer.json")
        write_rows(folder / "history.csv", fitted.history)
        save_file(units, folder / "units.safetensors")
        write_rows(folder / "routing.csv", history.rows([row["step"] for row in fitted.history]))
    return metrics
