"""Language model and classifier on noisy text and on a shifted view, with routing clean against noisy."""

from types import SimpleNamespace

import numpy as np
import torch

from pipeline.data.batches import encode_examples, open_tokens, segments, spaced
from pipeline.data.corpora import view
from pipeline.data.corruption import alphabet, corrupt_text, rng_for
from pipeline.data.tasks import Example, Task, read_task
from pipeline.data.tokenizers import Tokenizer
from pipeline.evaluation.robustness import (
    Noise,
    accuracy,
    bits,
    bits_degradation,
    classifier_trace,
    consistency,
    language_trace,
    texts,
)
from pipeline.files import output_folder, write_rows
from pipeline.models.heads import Classifier
from pipeline.models.transformer import Transformer
from pipeline.moe.layer import Mode
from pipeline.progress import Progress
from pipeline.training import checkpoint
from pipeline.training.loop import Log
from pipeline.training.validation import RoutingTally, score_tokens
from stages.finetune import classifier
from stages.paths import Cell, Paths
from stages.pretrain import language_model

Row = dict[str, str | float | None]

MEASURES = ("score", "degradation", "consistency")


def run(params: SimpleNamespace, paths: Paths, cell: Cell, log: Log) -> dict:
    """Writes scores.csv (a row per model, corruption and severity) and load.csv; returns means over the corruptions.

    Models: `pretrained` is the language model in its training mode, `warmed-up` the one after warm-up in the mode of
    inference, `classifier` the fine-tuned one. Degradation is positive when noise hurts, in bits per token or in shares of
    accuracy.
    """
    tokenizer = Tokenizer.load(paths.data / "tokenizer.json")
    task = read_task(paths.data / "task.jsonl")
    spec = language_model(params, cell, tokenizer)
    language_models = {
        name: checkpoint.load(paths.output(stage, cell), spec)
        for name, stage in (("pretrained", "pretrain"), ("warmed-up", "warmup"))
    }
    tuned = checkpoint.load(paths.output("finetune", cell), classifier(params, cell, tokenizer, task))
    symbols, characters = tokenizer.symbols, alphabet(params.data.view)
    # Where a token is no single character, a language model meets noise on tokens, a classifier on the text they are made of.
    units = np.arange(tokenizer.pad) if symbols is None else characters
    rates = params.robustness.rates
    noises = [Noise(kind, rate, cell.seed, units, symbols) for kind in params.robustness.kinds for rate in rates]
    scores: list[Row] = []
    load: list[Row] = []
    with Progress(f"robustness {cell.name}", total=3 * len(noises), unit="test") as progress:
        for name, model in language_models.items():
            mode = model.train_mode if name == "pretrained" else model.infer_mode
            rows, shares = _language(model, mode, noises, params, paths, tokenizer, progress)
            scores += [{"model": name, "mode": mode} | row for row in rows]
            load += [{"model": name, "mode": mode} | row for row in shares]
        noises = [noise._replace(alphabet=characters) for noise in noises]
        rows = _classifier(tuned, noises, params, task, tokenizer, progress)
        scores += [{"model": "classifier", "mode": tuned.backbone.infer_mode} | row for row in rows]
    for row in scores:
        if row["kind"] in params.robustness.kinds:
            values = {f"{row['model']}/{row['kind']}/{name}": row[name] for name in MEASURES if row[name] is not None}
            # The x axis of an MLflow chart is the step: severity in tenths of a percent.
            log(values, step=round(1000 * row["rate"]))
    with output_folder(paths.output("robustness", cell)) as folder:
        write_rows(folder / "scores.csv", scores)
        write_rows(folder / "load.csv", load)
    return {name: _summary([row for row in scores if row["model"] == name]) for name in (*language_models, "classifier")}


def _language(
    model: Transformer,
    mode: Mode,
    noises: list[Noise],
    params: SimpleNamespace,
    paths: Paths,
    tokenizer: Tokenizer,
    progress: Progress,
) -> tuple[list[Row], list[Row]]:
    context, limit, pad = params.model.context, params.robustness.segments, tokenizer.pad
    clean_segments = segments(open_tokens(paths.data / "test.npy", tokenizer.size), context, limit)
    inputs = clean_segments[:, :-1]
    clean = language_trace(model, texts(inputs, context, pad), clean_segments, mode)
    chooses = _chooses(model)
    rows: list[Row] = [_row("clean", 0.0, bits(clean), 0.0, 1.0 if chooses else None)]
    for noise in noises:
        given = texts(inputs, context, pad, noise)
        noisy = language_trace(model, given, clean_segments, mode)
        rows.append(
            _row(
                noise.kind,
                noise.rate,
                bits(noisy),
                bits_degradation(clean, noisy, given.source_ST),
                consistency(clean, noisy, given.source_ST) if chooses else None,
            )
        )
        progress.advance()
    if (paths.data / "raw.npy").exists():
        raw_segments = segments(open_tokens(paths.data / "raw.npy"), context, limit)
        shifted = bits(language_trace(model, texts(raw_segments[:, :-1], context, pad), raw_segments, mode))
        rows.append(_row("shift", 1.0, shifted, shifted - bits(clean), None))
    tally = RoutingTally(model)
    score_tokens(model, clean_segments, mode, "bpc", memory=0, watch=tally)
    shares: list[Row] = []
    for what, layers in (("expert", tally.expert_shares()), ("code", tally.code_shares())):
        for layer, share in enumerate(layers):
            shares += [{"what": what, "layer": layer, "index": i, "share": s} for i, s in enumerate(share.tolist())]
    return rows, shares


def _classifier(
    model: Classifier, noises: list[Noise], params: SimpleNamespace, task: Task, tokenizer: Tokenizer, progress: Progress
) -> list[Row]:
    context, mode = params.model.context, model.backbone.infer_mode
    passages = spaced(task.splits["test"], params.robustness.passages)
    encoded = encode_examples(passages, task.labels, tokenizer, params.data.view, context)
    labels_P = torch.as_tensor(encoded.labels)
    clean = classifier_trace(model, texts(encoded.ids, context, tokenizer.pad), mode)
    reference = accuracy(clean, labels_P)
    # Tokens made of noisy text have no clean ones to be compared with.
    aligned = tokenizer.symbols is not None and _chooses(model.backbone)
    rows: list[Row] = [_row("clean", 0.0, reference, 0.0, 1.0 if aligned else None)]
    for noise in noises:
        if tokenizer.symbols is None:
            given = texts(_noisy(passages, task, tokenizer, params.data.view, noise, context), context, tokenizer.pad)
        else:
            given = texts(encoded.ids, context, tokenizer.pad, noise)
        noisy = classifier_trace(model, given, mode)
        score = accuracy(noisy, labels_P)
        same = consistency(clean, noisy, given.source_ST) if aligned else None
        rows.append(_row(noise.kind, noise.rate, score, reference - score, same))
        progress.advance()
    if params.data.view == "text27" and tokenizer.kind == "bytes":
        raw = encode_examples(passages, task.labels, tokenizer, "bytes", context)
        score = accuracy(classifier_trace(model, texts(raw.ids, context, tokenizer.pad), mode), labels_P)
        rows.append(_row("shift", 1.0, score, reference - score, None))
    return rows


def _chooses(model: Transformer) -> bool:
    """Whether a token can go to one expert or another."""
    return model.moe_layers[0].experts.count > 1


def _noisy(
    passages: list[Example], task: Task, tokenizer: Tokenizer, view_name: str, noise: Noise, length: int
) -> list[np.ndarray]:
    """Ids of passages whose text, in a view, has noise on its characters."""
    examples = []
    for index, passage in enumerate(passages):
        rng = rng_for(noise.seed, noise.kind, noise.rate, index)
        text = corrupt_text(view(passage.text, view_name) or " ", noise.kind, noise.rate, noise.alphabet, rng)
        examples.append(Example(text, passage.label))
    return encode_examples(examples, task.labels, tokenizer, "bytes", length).ids


def _row(kind: str, rate: float, score: float, degradation: float, same: float | None) -> Row:
    return {"kind": kind, "rate": rate, "score": score, "degradation": degradation, "consistency": same}


def _summary(rows: list[Row]) -> dict[str, float]:
    """Clean score, and means over corruptions and severities (the shift stands alone)."""
    noisy = [row for row in rows if row["kind"] not in ("clean", "shift")]
    result = {"clean": rows[0]["score"]}
    result |= {name: float(np.mean([row[name] for row in noisy])) for name in MEASURES if noisy[0][name] is not None}
    shift = [row["degradation"] for row in rows if row["kind"] == "shift"]
    return result | ({"shift": shift[0]} if shift else {})
