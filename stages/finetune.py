"""Fine-tune the warmed-up backbone on the labelled task, in the mode it is used in at inference."""

from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.numpy import save_file
from sklearn.metrics import confusion_matrix, f1_score, precision_recall_fscore_support
from torch import Tensor

from pipeline.data.batches import Examples, encode_examples, spaced
from pipeline.data.tasks import Task, groups, read_task
from pipeline.data.tokenizers import Tokenizer
from pipeline.files import output_folder, write_rows
from pipeline.models.build import Spec, build
from pipeline.models.flops import flops_per_token
from pipeline.models.heads import Classifier
from pipeline.training import checkpoint
from pipeline.training.loop import Fitted, Log, fit
from pipeline.training.objectives import classification_objective
from pipeline.training.optim import adam
from pipeline.training.seeding import seed_everything
from pipeline.training.validation import classify
from stages.paths import Cell, Paths
from stages.pretrain import language_model


def classifier(params: SimpleNamespace, cell: Cell, tokenizer: Tokenizer, task: Task) -> Spec:
    """The description of this experiment's classifier, which `robustness` expects to find."""
    spec = language_model(params, cell, tokenizer)
    return spec.model_copy(
        update={
            "kind": "classifier",
            "labels": task.labels,
            "pooling": params.finetune.pooling,
            "head_dropout": params.finetune.head_dropout,
        }
    )


def run(params: SimpleNamespace, paths: Paths, cell: Cell, log: Log) -> dict:
    """Returns accuracy and macro-F1 on test, also without pre-training, and FLOPs per token.

    units.safetensors holds for each passage of the test split whether its label was right, and what it belongs to.
    """
    tokenizer = Tokenizer.load(paths.data / "tokenizer.json")
    task = read_task(paths.task(cell.task))
    chosen = task.splits | {"valid": spaced(task.splits["valid"], params.finetune.validate_passages)}
    examples = {
        # Training crops passages anew in every batch; scores are those of a passage's start.
        split: encode_examples(
            passages, task.labels, tokenizer, params.data.view, None if split == "train" else params.model.context
        )
        for split, passages in chosen.items()
    }
    spec = classifier(params, cell, tokenizer, task)
    seed_everything(cell.seed, "finetune")
    model = build(spec)
    model.backbone.load_state_dict(
        checkpoint.load(paths.output("warmup", cell), language_model(params, cell, tokenizer)).state_dict()
    )
    for layer in model.backbone.moe_layers:
        layer.freeze_assignment()
    fitted = _fit(model, params, cell, examples, tokenizer.pad, log, "finetune")
    mode = model.backbone.infer_mode
    test_PL = classify(model, examples["test"].ids, tokenizer.pad, mode)
    metrics = {
        "best_step": fitted.best_step,
        "valid": fitted.best,
        "test": _scores(test_PL, examples["test"]),
        "flops_per_token": flops_per_token(model.backbone, mode, params.model.context),
    }
    if params.finetune.scratch:
        seed_everything(cell.seed, "scratch")
        fresh = build(spec)
        _fit(fresh, params, cell, examples, tokenizer.pad, log, "scratch")
        metrics["scratch"] = _scores(classify(fresh, examples["test"].ids, tokenizer.pad, mode), examples["test"])
    with output_folder(paths.output("finetune", cell)) as folder:
        checkpoint.save(folder, model, spec)
        tokenizer.save(folder / "tokenizer.json")
        write_rows(folder / "history.csv", fitted.history)
        confusion, classes = _by_class(test_PL, examples["test"], task.labels)
        units = {"correct": (test_PL.argmax(1).numpy() == examples["test"].labels).astype(np.float64)}
        save_file(units | groups(task.splits["test"]), folder / "units.safetensors")
        write_rows(folder / "confusion.csv", confusion)
        write_rows(folder / "classes.csv", classes)
    return metrics


def _fit(
    model: Classifier, params: SimpleNamespace, cell: Cell, examples: dict[str, Examples], pad: int, log: Log, phase: str
) -> Fitted:
    settings, mode = params.finetune, model.backbone.infer_mode
    prefix = "" if phase == "finetune" else f"{phase}/"
    return fit(
        model,
        adam(model, settings.learning_rate, settings.beta2, settings.weight_decay),
        settings,
        objective=classification_objective(
            model, examples["train"], batch=settings.batch, crop=settings.crop, seed=cell.seed, pad=pad, mode=mode
        ),
        validate=lambda: _scores(classify(model, examples["valid"].ids, pad, mode), examples["valid"]),
        score="nats",
        log=lambda values, step: log({prefix + name: value for name, value in values.items()}, step),
        label=f"{phase} {cell.name}",
    )


def _scores(scores_PL: Tensor, examples: Examples) -> dict[str, float]:
    predicted = scores_PL.argmax(1).numpy()
    return {
        "nats": F.cross_entropy(scores_PL, torch.from_numpy(examples.labels)).item(),
        "accuracy": float((predicted == examples.labels).mean()),
        "macro_f1": float(f1_score(examples.labels, predicted, average="macro")),
    }


def _by_class(scores_PL: Tensor, examples: Examples, labels: tuple[str, ...]) -> tuple[list[dict], list[dict]]:
    """The confusion matrix, a row per true label and a column per predicted one, and scores of each label."""
    given = {"y_true": examples.labels, "y_pred": scores_PL.argmax(1).numpy(), "labels": range(len(labels))}
    # No label is the empty text, so the head of the true labels' column is none of them.
    confusion = [
        {"": label} | dict(zip(labels, row, strict=True)) for label, row in zip(labels, confusion_matrix(**given), strict=True)
    ]
    scores = zip(*precision_recall_fscore_support(**given, zero_division=0), strict=True)
    names = ("precision", "recall", "f1", "examples")
    return confusion, [{"label": label} | dict(zip(names, row, strict=True)) for label, row in zip(labels, scores, strict=True)]
