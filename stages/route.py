"""See how models route a text or an image: in colours, in numbers, as JSON or as a page."""

import json
import os
import re
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from pipeline import serving
from pipeline.config import Params
from pipeline.data.batches import evenly, open_tokens
from pipeline.data.corpora import read_text
from pipeline.data.tokenizers import Tokenizer
from pipeline.errors import UsageError, printable
from pipeline.files import output_file
from pipeline.serving.routing import (
    Noise,
    Routed,
    backbone_of,
    changed,
    contexts,
    route_ids,
    route_image,
    route_text,
)
from pipeline.serving.routing_page import Shown, experts_and_codes, page, palette, plain
from stages.paths import Cell, Paths

# A page of text has some 3,000 characters; what goes on a terminal or into a page has an end.
CHARACTERS = 20_000
# Of the validation text, among which the contexts are.
TOKENS = 16_384
MARKS = "0123456789abcdefghijklmnopqrstuvwxyz"


def route(
    models: Sequence[tuple[str, Path]],
    paths: Paths,
    text: str | None,
    file: Path | None,
    noise: Noise | None,
    by: str,
    html: Path | None,
    as_json: bool,
) -> None:
    """Print how each model, given by its name and folder, routes a text, or the text or image of a file; or write a page."""
    opened = [(name, serving.load(folder)) for name, folder in models]
    images = {isinstance(model, serving.ImageClassifier) for _, model in opened}
    if len(images) > 1:
        raise UsageError("some of the models read texts and some images; name models of one kind")
    if images == {True}:
        if file is None or noise is not None:
            raise UsageError("models of images; name an image file, without --text and --noise")
        shown = [_image(name, model, file) for name, model in opened]
    else:
        text, what = (read_text(file), str(file)) if text is None else (text, "the text")
        if not text:
            raise UsageError(f"{what}: empty; nothing to route")
        for _, model in opened:
            serving.seen_by(model.spec, text, what)
        if len(text) > CHARACTERS:
            raise UsageError(f"a text of {len(text):,} characters: at most {CHARACTERS:,} can be shown; cut it")
        shown = [_text(name, model, text, noise, paths, html is not None) for name, model in opened]
    if html is not None:
        first = opened[0][1]
        picture = (_png(file), first.model.grid) if images == {True} else (None, None)
        said = "" if noise is None else f"{noise.kind} {100 * noise.rate:g} %, seed {noise.seed}"
        with output_file(html) as path:
            path.write_text(page(shown, said, *picture), encoding="utf-8")
        print(f"{html}: open it in a browser")
    elif as_json:
        for one in shown:
            print(json.dumps(plain(one)))
    else:
        console = Console(highlight=False, soft_wrap=True)
        for (_, model), one in zip(opened, shown, strict=True):
            _print(console, one, by, model.model.grid if images == {True} else None)


def named(sources: Sequence[str]) -> list[str]:
    """What models are called: by as many of the last parts of their paths as tell them apart."""
    parts = [Path(os.path.abspath(source)).parts for source in sources]
    for count in range(1, max(map(len, parts), default=0) + 1):
        names = [os.path.join(*one[-count:]) for one in parts]
        if len(set(names)) == len(set(parts)):
            return names
    return []


def default_models(params: Params, paths: Paths) -> list[tuple[str, Path]]:
    """What pre-training left of every method, with the first seed."""
    cells = [Cell(method, params.grid.seeds[0]) for method in params.grid.methods]
    return [(cell.name, paths.output("pretrain", cell)) for cell in cells]


def _text(name: str, model: Any, text: str, noise: Noise | None, paths: Paths, for_page: bool) -> Shown:
    clean = route_text(model, text)
    noised = None if noise is None else route_text(model, text, noise)
    backbone = backbone_of(model)
    stands_for = []
    if for_page:
        stands_for = contexts(route_ids(model, _seen(model, paths, backbone.context, clean)), backbone.context)
    return Shown(name, model.spec, backbone.expert_blocks, clean, noised, stands_for)


def _seen(model: Any, paths: Paths, context: int, clean: Routed) -> np.ndarray:
    """Ids among which contexts are looked for: of the validation text, where it lies here and is in the model's tokens; else of
    the text itself.
    """
    tokens = paths.source / "valid.npy"
    if tokens.exists() and Tokenizer.load(paths.source / "tokenizer.json").digest == model.spec.tokenizer:
        ids = open_tokens(tokens, model.tokenizer.size)
        if len(ids) >= context:
            starts = evenly(len(ids) - context + 1, TOKENS // context)
            return np.concatenate([ids[start : start + context] for start in starts])
    return model.tokenizer.encode_some("".join(clean.pieces))


def _image(name: str, model: serving.ImageClassifier, file: Path) -> Shown:
    return Shown(name, model.spec, backbone_of(model).expert_blocks, route_image(model, file), None, [])


def _png(file: Path) -> bytes:
    from PIL import Image

    found = BytesIO()
    with Image.open(file) as image:
        image.convert("RGB").save(found, "PNG")
    return found.getvalue()


def _print(console: Console, one: Shown, by: str, grid: tuple[int, int] | None) -> None:
    """Layer by layer the text in the colours of experts or codes, or, where there are no colours, above their numbers."""
    experts, codes = experts_and_codes(one.spec)
    by_code = by == "code" and codes is not None
    count = codes if by_code else experts
    colours = palette(count)
    for place, block in enumerate(one.blocks):
        for routed in filter(None, (one.clean, one.noised)):
            layer = routed.layers[place]
            number_T = layer.code_T if by_code else layer.expert_TK[:, 0]
            moved_T = changed(one.clean, routed)[place] if routed is one.noised else np.zeros(len(number_T), bool)
            title = f"{one.name}, block {block}, by {'code' if by_code else 'expert'} of {count}"
            if routed is one.noised:
                title += f", noised: {moved_T.sum()} of {len(moved_T)} tokens go to other experts"
            console.print(Text(printable(title), "bold"))
            pieces = routed.pieces or _cells(grid)
            if console.color_system is None or console.no_color:
                _numbers(console, pieces, number_T, moved_T, count)
            else:
                legend = Text()
                for number in np.unique(number_T[number_T >= 0]).tolist():
                    legend.append(f" {number} ", f"black on {colours[number]}")
                console.print(legend)
                line = Text()
                for piece, number, moved in zip(pieces, number_T.tolist(), moved_T.tolist(), strict=True):
                    style = f"black on {colours[number]}" if number >= 0 else ""
                    line.append(_visible(piece), f"{style} bold underline" if moved else style)
                console.print(line)
            console.print()


def _cells(grid: tuple[int, int]) -> list[str]:
    """A cell for each patch of an image, and an end of the line after each row."""
    rows, columns = grid
    return ["    \n" if place % columns == columns - 1 else "    " for place in range(rows * columns)]


def _visible(text: str) -> str:
    """A mark in the place of each character that a terminal would obey, as of a tab."""
    return re.sub(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", "\N{MIDDLE DOT}", text)


def _numbers(console: Console, pieces: Sequence[str], number_T: np.ndarray, moved_T: np.ndarray, count: int) -> None:
    """Lines of text, under each token its number, and under that a caret where noise has changed it."""
    rows: list[list[tuple[str, str, str]]] = [[]]
    width = 0
    for piece, number, moved in zip(pieces, number_T.tolist(), moved_T.tolist(), strict=True):
        mark = "." if number < 0 else MARKS[number] if count <= len(MARKS) else f"{number} "
        shown = _visible(piece.replace("\n", " "))
        size = max(cell_len(shown), len(mark))
        if width + size > console.width:
            rows.append([])
            width = 0
        rows[-1].append((shown + " " * (size - cell_len(shown)), mark.ljust(size), ("^" if moved else "").ljust(size)))
        width += size
        if piece.endswith("\n"):
            rows.append([])
            width = 0
    for row in filter(None, rows):
        for line in zip(*row, strict=True):
            if joined := "".join(line).rstrip():
                # As Text: in a string rich would take [words] for markup and :words: for emoji.
                console.print(Text(joined))
