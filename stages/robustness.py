"""Language model and classifiers under noise, attack and shift, text by text, and what the routing does meanwhile."""

from collections.abc import Iterable
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.numpy import save_file
from torch import Tensor

from pipeline.data.batches import encode_examples, open_tokens, segments, spaced
from pipeline.data.corpora import view
from pipeline.data.corruption import Alphabet, alphabet, corrupt_text, rng_for
from pipeline.data.tasks import Example, Task, groups, read_task
from pipeline.data.tokenizers import Tokenizer
from pipeline.evaluation.attack import Loss, apply, greedy
from pipeline.evaluation.robustness import (
    Effect,
    Noise,
    Texts,
    classifier_effect,
    classifier_trace,
    language_effect,
    language_trace,
    shift_effect,
    texts,
)
from pipeline.evaluation.routing import collapse
from pipeline.files import output_folder, write_rows
from pipeline.models.heads import Classifier
from pipeline.models.transformer import Transformer
from pipeline.moe.layer import Mode
from pipeline.progress import Progress
from pipeline.training import checkpoint
from pipeline.training.loop import Log
from pipeline.training.validation import RoutingTally
from stages.finetune import classifier
from stages.paths import Cell, Paths
from stages.pretrain import language_model

Row = dict[str, str | float | None]

FAMILIES = ("clean", "noise", "attack", "shift")
MEASURES = ("score", "degradation", "consistency", "kappa", "ece", "flips")


class Record:
    """Results of one model in one mode: rows of scores.csv and layers.csv, and the values of each text behind them."""

    def __init__(self, model: str, mode: Mode) -> None:
        self.name: Row = {"model": model, "mode": mode}
        self.rows: list[Row] = []
        self.units: dict[str, np.ndarray] = {}
        self._steady: dict[str, list[list[float | None]]] = {"consistency": [], "kappa": []}

    def add(self, family: str, kind: str, rate: float, effect: Effect) -> None:
        means = {"score": float(effect.score_S.mean()), "degradation": float(effect.lost_S.mean())}
        steady = {name: _mean(getattr(effect, name) or []) for name in self._steady}
        more = steady | {"ece": effect.ece, "flips": effect.flips}
        self.rows.append(self.name | {"family": family, "kind": kind, "rate": rate} | means | more)
        key = f"{self.name['model']}/{self.name['mode']}/{kind}/{rate!r}"
        self.units |= {f"{key}/score": effect.score_S, f"{key}/lost": effect.lost_S}
        for name, conditions in self._steady.items():
            if family == "noise" and getattr(effect, name) is not None:
                conditions.append(getattr(effect, name))

    def layers(self, tally: RoutingTally, collapsed: list[dict[str, float]]) -> list[Row]:
        """Routing of each layer: consistency over all noise, load, margin and codebook on clean text, collapse of its experts."""
        return [
            self.name
            | row
            | {name: _mean([found[layer] for found in conditions]) for name, conditions in self._steady.items()}
            | apart
            for layer, (row, apart) in enumerate(zip(tally.rows(), collapsed, strict=True))
        ]

    def load(self, tally: RoutingTally) -> list[Row]:
        """Share of each expert and code on clean text."""
        return [
            self.name | {"what": what, "layer": layer, "index": index, "share": share}
            for what, shares in (("expert", tally.expert_shares()), ("code", tally.code_shares()))
            for layer, values in enumerate(shares)
            for index, share in enumerate(values.tolist())
        ]

    def summary(self) -> dict[str, dict[str, float]]:
        """Mean of each measure over the conditions of a family; every shift stands alone."""
        result = {}
        for family in FAMILIES:
            for kind in {row["kind"]: None for row in self.rows if row["family"] == family} if family == "shift" else (None,):
                chosen = [row for row in self.rows if row["family"] == family and kind in (None, row["kind"])]
                means = {name: [row[name] for row in chosen if row[name] is not None] for name in MEASURES}
                result[kind or family] = {name: float(np.mean(values)) for name, values in means.items() if values}
        return {name: values for name, values in result.items() if values}


def run(params: SimpleNamespace, paths: Paths, cell: Cell, log: Log) -> dict:
    """Writes scores.csv, layers.csv, load.csv and units.safetensors; returns means over corruptions and severities.

    `language` is the pre-trained language model in its training mode and in that of inference, a task's name its classifier.
    Scores are bits per token (lower is better) and shares of right labels; degradation is positive when it hurts.
    """
    tokenizer = Tokenizer.load(paths.data / "tokenizer.json")
    tasks = {name: read_task(paths.task(name)) for name in params.data.tasks}
    model = checkpoint.load(paths.output("pretrain", cell), language_model(params, cell, tokenizer))
    tuned = {
        name: checkpoint.load(paths.output("finetune", cell._replace(task=name)), classifier(params, cell, tokenizer, task))
        for name, task in tasks.items()
    }
    modes = tuple(dict.fromkeys((model.train_mode, model.infer_mode)))
    conditions = len(params.robustness.kinds) * len(params.robustness.rates) + len(params.robustness.attack_rates)
    records, layers, load = [], [], []
    with Progress(f"robustness {cell.name}", total=(len(modes) + len(tasks)) * conditions, unit="test") as progress:
        bench = Bench(params, paths, cell, tokenizer, progress)
        for mode in modes:
            records.append(record := Record("language", mode))
            tally, collapsed = bench.language(model, mode, record)
            layers += record.layers(tally, collapsed)
            load += record.load(tally)
        for name, task in tasks.items():
            records.append(record := Record(name, tuned[name].backbone.infer_mode))
            tally, collapsed = bench.classifier(tuned[name], task, record)
            layers += record.layers(tally, collapsed)
            load += record.load(tally)
    rows = [row for record in records for row in record.rows]
    for row in rows:
        if row["family"] in ("noise", "attack"):
            place = f"{row['model']}/{row['mode']}/{row['kind']}"
            # The x axis of an MLflow chart is the step: severity in tenths of a percent.
            log({f"{place}/{name}": row[name] for name in MEASURES if row[name] is not None}, step=round(1000 * row["rate"]))
    with output_folder(paths.output("robustness", cell)) as folder:
        write_rows(folder / "scores.csv", rows)
        write_rows(folder / "layers.csv", layers)
        write_rows(folder / "load.csv", load)
        save_file({key: values for record in records for key, values in record.units.items()}, folder / "units.safetensors")
    metrics: dict = {}
    for record in records:
        metrics.setdefault(record.name["model"], {})[record.name["mode"]] = record.summary()
    return metrics


class Bench:
    """Puts models under the noises, attacks and shifts of params."""

    def __init__(self, params: SimpleNamespace, paths: Paths, cell: Cell, tokenizer: Tokenizer, progress: Progress) -> None:
        self.params, self.paths, self.cell, self.tokenizer, self.progress = params, paths, cell, tokenizer, progress
        self.characters = alphabet(params.data.view)
        self.context, self.settings = params.model.context, params.robustness

    def language(self, model: Transformer, mode: Mode, record: Record) -> tuple[RoutingTally, list[dict[str, float]]]:
        tokens, pad = self.tokenizer, self.tokenizer.pad
        clean_segments = segments(open_tokens(self.paths.data / "test.npy", tokens.size), self.context, self.settings.segments)
        inputs, experts = clean_segments[:, :-1], model.moe_layers[0].experts.count
        tally = RoutingTally(model)
        given = texts(inputs, self.context, pad)
        clean = language_trace(model, given, clean_segments, mode, watch=tally)
        record.add("clean", "clean", 0.0, language_effect(clean, clean, given.source_ST, experts))
        # Where a token is no single character, a language model meets noise on tokens.
        units = self.characters if tokens.symbols is not None else Alphabet(np.arange(pad), tokens.encode("aaa")[:1], None)
        for noise in self._noises(units):
            given = texts(inputs, self.context, pad, noise)
            noisy = language_trace(model, given, clean_segments, mode)
            record.add("noise", noise.kind, noise.rate, language_effect(clean, noisy, given.source_ST, experts))
            self.progress.advance()
        some = _spaced(len(inputs), self.settings.attack_texts)
        target_ST = torch.from_numpy(clean_segments[some, 1:].astype(np.int64))
        base = clean.some(some)

        def loss(tokens_BT: Tensor, rows_B: Tensor) -> Tensor:
            return model.nats(model(tokens_BT, mode).state_BTD, target_ST[rows_B]).mean(1)

        for rate, given in self._attacked(loss, model, texts(inputs[some], self.context, pad)):
            noisy = language_trace(model, given, clean_segments[some], mode)
            record.add("attack", "greedy", rate, language_effect(base, noisy, given.source_ST, experts))
        for file in sorted((self.paths.data / "shifts").iterdir()):
            if file.stem == "raw" or file.stem in self.params.data.shifts:
                other = segments(open_tokens(file, tokens.size), self.context, self.settings.segments)
                shifted = language_trace(model, texts(other[:, :-1], self.context, pad), other, mode)
                record.add("shift", file.stem, 0.0, shift_effect(clean, shifted))
        return tally, collapse(model, torch.from_numpy(inputs.astype(np.int64)), mode)

    def classifier(self, model: Classifier, task: Task, record: Record) -> tuple[RoutingTally, list[dict[str, float]]]:
        mode, pad, view_name = model.backbone.infer_mode, self.tokenizer.pad, self.params.data.view
        passages = spaced(task.splits["test"], self.settings.passages)
        encoded = encode_examples(passages, task.labels, self.tokenizer, view_name, self.context)
        labels_S = torch.as_tensor(encoded.labels)
        # Tokens made of noisy text have no clean ones to be compared with.
        experts = model.backbone.moe_layers[0].experts.count
        aligned = experts if self.tokenizer.symbols is not None else 0
        tally = RoutingTally(model.backbone)
        plain = texts(encoded.ids, self.context, pad)
        clean = classifier_trace(model, plain, mode, watch=tally)
        record.add("clean", "clean", 0.0, classifier_effect(clean, clean, labels_S, plain.source_ST, aligned))
        for noise in self._noises(self.characters):
            if self.tokenizer.symbols is not None:
                given = texts(encoded.ids, self.context, pad, noise)
            else:
                given = texts(self._noisy(passages, task, noise), self.context, pad)
            noisy = classifier_trace(model, given, mode)
            record.add("noise", noise.kind, noise.rate, classifier_effect(clean, noisy, labels_S, given.source_ST, aligned))
            self.progress.advance()
        record.units |= {f"{record.name['model']}/{key}": numbers for key, numbers in groups(passages).items()}
        some = _spaced(len(passages), self.settings.attack_texts)
        attacked = [passages[i] for i in some]
        record.units |= {f"{record.name['model']}/attack/{key}": numbers for key, numbers in groups(attacked).items()}
        base, chosen = clean.some(some), texts([encoded.ids[i] for i in some], self.context, pad)

        def loss(tokens_BT: Tensor, rows_B: Tensor) -> Tensor:
            scores_BC, _ = model(tokens_BT, chosen.lengths_S[rows_B], mode)
            return F.cross_entropy(scores_BC, labels_S[some][rows_B], reduction="none")

        for rate, given in self._attacked(loss, model.backbone, chosen):
            noisy = classifier_trace(model, given, mode)
            record.add("attack", "greedy", rate, classifier_effect(base, noisy, labels_S[some], given.source_ST, experts))
        if view_name == "text27" and self.tokenizer.kind == "bytes":
            raw = encode_examples(passages, task.labels, self.tokenizer, "bytes", self.context)
            given = texts(raw.ids, self.context, pad)
            shifted = classifier_trace(model, given, mode)
            record.add("shift", "raw", 0.0, classifier_effect(clean, shifted, labels_S, given.source_ST, 0))
        return tally, collapse(model.backbone, plain.tokens_ST, mode, plain.source_ST >= 0)

    def _noises(self, units: Alphabet) -> Iterable[Noise]:
        for kind in self.settings.kinds:
            for rate in self.settings.rates:
                yield Noise(kind, rate, self.cell.seed, units, self.tokenizer.symbols)

    def _attacked(self, loss: Loss, model: Transformer, given: Texts) -> Iterable[tuple[float, Texts]]:
        """Each rate with texts in which the attack has substituted that share of the tokens, at least one."""
        symbols = self.tokenizer.symbols
        allowed = np.arange(self.tokenizer.pad) if symbols is None else np.searchsorted(symbols, self.characters.symbols)
        rates = self.settings.attack_rates
        most_S = (rates[-1] * given.lengths_S).ceil().long()
        edits = greedy(
            loss,
            model.embedding,
            given.tokens_ST,
            given.source_ST >= 0,
            torch.from_numpy(allowed.astype(np.int64)),
            most_S,
            self.settings.attack_queries,
            seed=self.cell.seed,
        )
        for rate in rates:
            yield rate, given._replace(tokens_ST=apply(given.tokens_ST, edits, (rate * given.lengths_S).ceil().long()))
            self.progress.advance()

    def _noisy(self, passages: list[Example], task: Task, noise: Noise) -> list[np.ndarray]:
        """Ids of passages whose text, in the view, has noise on its characters."""
        examples = []
        for index, passage in enumerate(passages):
            rng = rng_for(noise.seed, noise.kind, noise.rate, index)
            text = corrupt_text(view(passage.text, self.params.data.view) or " ", noise.kind, noise.rate, noise.alphabet, rng)
            examples.append(Example(text, passage.label))
        return encode_examples(examples, task.labels, self.tokenizer, "bytes", self.context).ids


def _mean(values: Iterable[float | None]) -> float | None:
    """Of the values there are."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _spaced(count: int, limit: int) -> np.ndarray:
    """At most `limit` of the numbers under `count`, evenly spaced."""
    return np.unique(np.linspace(0, count - 1, limit).astype(int))
