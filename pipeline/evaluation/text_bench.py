"""Language model and classifiers of texts under noise, attack and shift, text by text, and what the routing does meanwhile."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.config import TextRobustness, TextView
from pipeline.data.batches import document_numbers, encode_examples, evenly, segment_starts, segments, spaced
from pipeline.data.corpora import view as viewed
from pipeline.data.corruption import Alphabet, alphabet, corrupt_text, rng_for
from pipeline.data.tasks import Example, Task, groups
from pipeline.data.tokenizers import Tokenizer
from pipeline.evaluation.attack import Loss, apply, greedy
from pipeline.evaluation.records import Record
from pipeline.evaluation.robustness import (
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
from pipeline.models.heads import Classifier
from pipeline.models.transformer import Transformer
from pipeline.moe.layer import Mode
from pipeline.progress import Progress
from pipeline.training.validation import RoutingTally


class Numbered(NamedTuple):
    """Tokens of a text, and the places of the first ones of its documents."""

    tokens: np.ndarray
    documents: np.ndarray


class TextBench:
    """Puts a language model and classifiers of texts under the noises, attacks and shifts of params."""

    def __init__(
        self, settings: TextRobustness, context: int, view: TextView, tokenizer: Tokenizer, seed: int, progress: Progress
    ) -> None:
        self.settings, self.context, self.view = settings, context, view
        self.tokenizer, self.seed, self.progress = tokenizer, seed, progress
        self.characters = alphabet(view)

    def language(
        self, model: Transformer, mode: Mode, record: Record, test: Numbered, shifts: Mapping[str, Numbered]
    ) -> tuple[RoutingTally, list[dict[str, float]]]:
        tokens, pad = self.tokenizer, self.tokenizer.pad
        clean_segments, number_S = self._segments(test)
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
        some = evenly(len(inputs), self.settings.attack_texts)
        target_ST = torch.from_numpy(clean_segments[some, 1:].astype(np.int64)).to(model.device)
        base = clean.some(some)

        def loss(tokens_BT: Tensor, rows_B: Tensor) -> Tensor:
            return model.nats(model(tokens_BT, mode).state_BTD, target_ST[rows_B]).mean(1)

        for rate, given in self._attacked(loss, model, texts(inputs[some], self.context, pad)):
            noisy = language_trace(model, given, clean_segments[some], mode)
            record.add("attack", "greedy", rate, language_effect(base, noisy, given.source_ST, experts))
        model_name = record.name["model"]
        record.units |= {f"{model_name}/groups": number_S, f"{model_name}/attack/groups": number_S[some]}
        for name, other_text in shifts.items():
            other, record.units[f"{model_name}/{name}/groups"] = self._segments(other_text)
            shifted = language_trace(model, texts(other[:, :-1], self.context, pad), other, mode)
            record.add("shift", name, 0.0, shift_effect(clean, shifted))
        tokens_ST = torch.from_numpy(inputs.astype(np.int64))
        return tally, collapse(model, lambda rows: model(tokens_ST[rows], mode), torch.ones_like(tokens_ST, dtype=torch.bool))

    def classifier(self, model: Classifier, record: Record, task: Task) -> tuple[RoutingTally, list[dict[str, float]]]:
        mode, pad = model.backbone.infer_mode, self.tokenizer.pad
        passages = spaced(task.splits["test"], self.settings.passages)
        encoded = encode_examples(passages, task.labels, self.tokenizer, self.view, self.context)
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
        some = evenly(len(passages), self.settings.attack_texts)
        attacked = [passages[i] for i in some]
        record.units |= {f"{record.name['model']}/attack/{key}": numbers for key, numbers in groups(attacked).items()}
        base, chosen = clean.some(some), texts([encoded.ids[i] for i in some], self.context, pad)
        lengths_S, true_S = chosen.lengths_S.to(model.backbone.device), labels_S[some].to(model.backbone.device)

        def loss(tokens_BT: Tensor, rows_B: Tensor) -> Tensor:
            scores_BC, _ = model(tokens_BT, lengths_S[rows_B], mode)
            return F.cross_entropy(scores_BC, true_S[rows_B], reduction="none")

        for rate, given in self._attacked(loss, model.backbone, chosen):
            noisy = classifier_trace(model, given, mode)
            record.add("attack", "greedy", rate, classifier_effect(base, noisy, labels_S[some], given.source_ST, experts))
        if self.view == "text27" and self.tokenizer.kind == "bytes":
            raw = encode_examples(passages, task.labels, self.tokenizer, "bytes", self.context)
            given = texts(raw.ids, self.context, pad)
            shifted = classifier_trace(model, given, mode)
            record.add("shift", "raw", 0.0, classifier_effect(clean, shifted, labels_S, given.source_ST, 0))
        valid_ST = plain.source_ST >= 0
        return tally, collapse(model.backbone, lambda rows: model.backbone(plain.tokens_ST[rows], mode, valid_ST[rows]), valid_ST)

    def _segments(self, text: Numbered) -> tuple[np.ndarray, np.ndarray]:
        """Segments (S, context + 1) of a text, and the number (S,) of the document that each begins in."""
        starts_S = segment_starts(text.tokens, self.context, self.settings.segments)
        some = segments(text.tokens, self.context, self.settings.segments)
        return some, document_numbers(text.documents, starts_S)

    def _noises(self, units: Alphabet) -> Iterable[Noise]:
        for kind in self.settings.kinds:
            for rate in self.settings.rates:
                yield Noise(kind, rate, self.seed, units, self.tokenizer.symbols)

    def _attacked(self, loss: Loss, model: Transformer, given: Texts) -> Iterable[tuple[float, Texts]]:
        """Each rate with texts in which the attack has substituted that share of the tokens, at least one."""
        symbols = self.tokenizer.symbols
        allowed = np.arange(self.tokenizer.pad) if symbols is None else np.searchsorted(symbols, self.characters.symbols)
        rates = self.settings.attack_rates
        most_S = (rates[-1] * given.lengths_S).ceil().long()
        texts_and_limits = given.tokens_ST, given.source_ST >= 0, torch.from_numpy(allowed.astype(np.int64)), most_S
        attacked = (one.to(model.device) for one in texts_and_limits)
        edits = greedy(loss, model.embedding, *attacked, self.settings.attack_queries, seed=self.seed).cpu()
        for rate in rates:
            yield rate, given._replace(tokens_ST=apply(given.tokens_ST, edits, (rate * given.lengths_S).ceil().long()))
            self.progress.advance()

    def _noisy(self, passages: list[Example], task: Task, noise: Noise) -> list[np.ndarray]:
        """Ids of passages whose text, in the view, has noise on its characters."""
        examples = []
        for index, passage in enumerate(passages):
            rng = rng_for(noise.seed, noise.kind, noise.rate, index)
            text = corrupt_text(viewed(passage.text, self.view) or " ", noise.kind, noise.rate, noise.alphabet, rng)
            examples.append(Example(text, passage.label))
        return encode_examples(examples, task.labels, self.tokenizer, "bytes", self.context).ids
