"""How trained models assign the tokens of a text, or the patches of an image, to their experts, layer by layer.

Shapes: T tokens or patches, K experts per token, C codes, D width; B windows of at most `context` tokens, N tokens of a pass.
"""

import codecs
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from pipeline.data.corpora import view
from pipeline.data.corruption import Alphabet, alphabet, corrupt, rng_for
from pipeline.data.tokenizers import Tokenizer
from pipeline.models.backbone import Backbone, Hidden
from pipeline.moe import stats
from pipeline.moe.quantizers.base import watched
from pipeline.serving.served import ImageClassifier, LanguageModel, Served, TextClassifier

WINDOWS = 32  # in a pass
# Tokens on each side of a context, and contexts of a code.
BEFORE, AFTER, CONTEXTS = 24, 12, 6


class Noise(NamedTuple):
    """A corruption by its name in params, its rate in 0..1, and what decides its draws."""

    kind: str
    rate: float
    seed: int


class Layer(NamedTuple):
    """What one layer did with T tokens.

    Experts (T, K), the first choice first, -1 where one took no more; codes (T,) where a quantizer chose; the margin between best
    and second score in standard deviations of a token's scores; the squared distance between a state and its code. None where a
    method has none of these.
    """

    expert_TK: np.ndarray
    code_T: np.ndarray | None
    margin_T: np.ndarray | None
    distance_T: np.ndarray | None


class Routed(NamedTuple):
    """The tokens of a text as pieces of it, none for the patches of an image; their clean places, -1 where noise put one in."""

    pieces: list[str]
    source_T: np.ndarray
    layers: list[Layer]


class Context(NamedTuple):
    """A token among its neighbours, and its distance to its code or, without codes, its margin."""

    before: str
    token: str
    after: str
    value: float


def route_text(model: LanguageModel | TextClassifier, text: str, noise: Noise | None = None) -> Routed:
    """How a text is routed in the mode of inference: whole, in windows of `context` tokens, by a language model; its start, as
    much as is read, by a classifier. With noise, as that leaves each window.
    """
    ids = model.tokenizer.encode_some(view(text, model.spec.view))
    return route_ids(model, ids if isinstance(model, LanguageModel) else ids[: backbone_of(model).context], noise)


def route_ids(model: LanguageModel | TextClassifier, ids: np.ndarray, noise: Noise | None = None) -> Routed:
    """The same of ids, in windows in any case."""
    backbone = backbone_of(model)
    starts = range(0, len(ids), backbone.context)
    windows = [ids[start : start + backbone.context] for start in starts]
    sources = [np.arange(start, start + len(window)) for start, window in zip(starts, windows, strict=True)]
    if noise is not None:
        noised = [_noised(model, window, noise, place) for place, window in enumerate(windows)]
        windows = [window[: backbone.context] for window, _ in noised]
        sources = [
            np.where(origin < 0, -1, origin + start)[: backbone.context]
            for start, (_, origin) in zip(starts, noised, strict=True)
        ]
    passes = []
    for first in range(0, len(windows), WINDOWS):
        some = windows[first : first + WINDOWS]
        tokens_BT = np.full((len(some), max(map(len, some))), model.tokenizer.pad)
        for row, window in enumerate(some):
            tokens_BT[row, : len(window)] = window
        valid_BT = torch.from_numpy(tokens_BT != model.tokenizer.pad)
        tokens = torch.from_numpy(tokens_BT.astype(np.int64))
        passes.append(_pass(backbone, lambda tokens=tokens, valid=valid_BT: _hidden(backbone, tokens, valid)))
    return Routed(pieces(model.tokenizer, np.concatenate(windows)), np.concatenate(sources), _joined(passes))


def route_image(model: ImageClassifier, file: Path) -> Routed:
    """How the patches of an image file are routed, row by row."""
    # Loads torchvision, which texts need not wait for.
    from pipeline.data.image_decode import read_image

    pixels_1CHW = torch.from_numpy(read_image(file, model.spec.view, model.spec.size))[None] / 255
    vit = model.model
    layers = [
        Layer(*(None if one is None else vit.patches(torch.from_numpy(one))[0].numpy() for one in layer))
        for layer in _pass(vit, lambda: vit(pixels_1CHW, vit.infer_mode)[1])
    ]
    return Routed([], np.arange(len(layers[0].expert_TK)), layers)


def backbone_of(model: Served) -> Backbone:
    """The part of a model that has its mixture layers."""
    return model.model.backbone if isinstance(model, TextClassifier) else model.model


def changed(clean: Routed, noised: Routed) -> list[np.ndarray]:
    """Per layer whether each noised token (T,) goes to other experts than it did in the clean text; false where noise put it."""
    kept_T, origin_T = noised.source_T >= 0, noised.source_T.clip(min=0)
    return [
        kept_T & (np.sort(before.expert_TK[origin_T], 1) != np.sort(after.expert_TK, 1)).any(1)
        for before, after in zip(clean.layers, noised.layers, strict=True)
    ]


def contexts(routed: Routed, window: int) -> list[dict[int, list[Context]]]:
    """Per layer for each code the contexts of the tokens nearest to it, nearest first; without codes, for each expert those of
    the tokens that it got with the widest margin. No context is there twice, and nothing where a layer has neither.

    A context ends where its window of so many tokens does, beyond which the model has not read.
    """
    found = []
    for layer in routed.layers:
        of_T, value_T = (layer.code_T, layer.distance_T) if layer.code_T is not None else (layer.expert_TK[:, 0], layer.margin_T)
        by_code: dict[int, list[Context]] = {}
        if value_T is not None:
            order_T = np.argsort(value_T if layer.code_T is not None else -value_T, kind="stable")
            for code in np.unique(of_T[of_T >= 0]).tolist():
                by_code[code] = _first(routed.pieces, window, order_T[of_T[order_T] == code], value_T)
        found.append(by_code)
    return found


def pieces(tokenizer: Tokenizer, ids: np.ndarray) -> list[str]:
    """The text of each id. What several bytes make together is that of the last of them."""
    if tokenizer.symbols is None:
        texts = [tokenizer.decode(ids[place : place + 1]) for place in range(len(ids))]
        return [text if text == "\n" else f"{text} " for text in texts] if tokenizer.kind == "words" else texts
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    return [decoder.decode(bytes([symbol])) for symbol in tokenizer.symbols[ids].tolist()]


def _first(pieces: Sequence[str], window: int, order_N: np.ndarray, value_T: np.ndarray) -> list[Context]:
    kept: dict[tuple[str, str, str], Context] = {}
    for place in order_N.tolist():
        start = place - place % window
        before = "".join(pieces[max(start, place - BEFORE) : place])
        after = "".join(pieces[place + 1 : min(start + window, place + 1 + AFTER)])
        kept.setdefault((before, pieces[place], after), Context(before, pieces[place], after, float(value_T[place])))
        if len(kept) == CONTEXTS:
            break
    return list(kept.values())


def _noised(
    model: LanguageModel | TextClassifier, window: np.ndarray, noise: Noise, place: int
) -> tuple[np.ndarray, np.ndarray]:
    """A window's ids under noise, and the place in it that each comes from. Draws are those of a text of this number."""
    tokenizer, rng = model.tokenizer, rng_for(noise.seed, noise.kind, noise.rate, place)
    if tokenizer.symbols is None:
        # Where a token is no single symbol, noise works on tokens.
        units = Alphabet(np.arange(tokenizer.pad), tokenizer.encode("aaa")[:1], None)
        return corrupt(window, noise.kind, noise.rate, units, rng)
    symbols, origin = corrupt(tokenizer.symbols[window], noise.kind, noise.rate, alphabet(model.spec.view), rng)
    return np.searchsorted(tokenizer.symbols, symbols), origin


def _hidden(backbone: Backbone, tokens_BT: torch.Tensor, valid_BT: torch.Tensor) -> Hidden:
    return backbone(tokens_BT, backbone.infer_mode, None if valid_BT.all() else valid_BT)


@torch.no_grad()
def _pass(backbone: Backbone, run: Callable[[], Hidden]) -> list[Layer]:
    """One pass, layer by layer: of real tokens, in their order."""
    quantizers = [getattr(layer, "quantizer", None) for layer in backbone.moe_layers]
    with watched([one for one in quantizers if one is not None]) as seen:
        outputs = [output.cpu() for output in run().layers]
    distances = iter(seen)
    return [
        Layer(
            output.index_NK.numpy(),
            None if output.code_N is None else output.code_N.numpy(),
            _numpy(None if output.scores is None else stats.margins(output.scores)),
            None if quantizer is None else _numpy(torch.cat(next(distances))),
        )
        for output, quantizer in zip(outputs, quantizers, strict=True)
    ]


def _numpy(one: torch.Tensor | None) -> np.ndarray | None:
    return None if one is None else one.float().cpu().numpy()


def _joined(passes: Sequence[Sequence[Layer]]) -> list[Layer]:
    return [
        Layer(*(None if one[0] is None else np.concatenate(one) for one in zip(*layers, strict=True)))
        for layers in zip(*passes, strict=True)
    ]
