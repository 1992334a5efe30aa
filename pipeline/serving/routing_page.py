"""The routing of a text or an image by several models as one page that needs nothing beside itself."""

import base64
import colorsys
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2

from pipeline.models.build import Spec
from pipeline.serving.routing import Context, Routed, changed

DIGITS = 3


class Shown(NamedTuple):
    """What a page shows of a model: its name, the clean text or image, a noised text, and per layer the contexts of each code."""

    name: str
    spec: Spec
    blocks: Sequence[int]
    clean: Routed
    noised: Routed | None
    contexts: Sequence[dict[int, list[Context]]]


def palette(count: int) -> list[str]:
    """Colours (#rrggbb), light enough for black letters; neighbours differ in hue and, where there are many, in lightness."""
    return [
        "#" + "".join(f"{round(255 * part):02x}" for part in colorsys.hls_to_rgb(place / count, (0.82, 0.72)[place % 2], 0.75))
        for place in range(count)
    ]


def experts_and_codes(spec: Spec) -> tuple[int, int | None]:
    """How many experts a layer of a model has to choose from, and codes, if codes choose."""
    return 1 if spec.method == "dense" else spec.model.experts, getattr(spec.settings, "codes", None)


def plain(one: Shown) -> dict[str, Any]:
    """As JSON values."""
    experts, codes = experts_and_codes(one.spec)
    return {
        "model": one.name,
        "method": one.spec.method,
        "experts": experts,
        "codes": codes,
        "blocks": list(one.blocks),
        "clean": _plain(one.clean),
        "noised": None if one.noised is None else _plain(one.noised) | {"changed": _changed(one)},
    }


def page(models: Sequence[Shown], noise: str, image: bytes | None = None, grid: tuple[int, int] | None = None) -> str:
    """The page. With an image (PNG) its patches (rows, columns) are shown, else the tokens of a text."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
    )
    data = [
        plain(one)
        | {"colours": {"expert": palette(experts_and_codes(one.spec)[0]), "code": palette(experts_and_codes(one.spec)[1] or 1)}}
        | {"contexts": [{code: [list(context) for context in some] for code, some in layer.items()} for layer in one.contexts]}
        for one in models
    ]
    return environment.get_template("routing.html").render(
        # A text may say </script>.
        data=json.dumps(data, separators=(",", ":")).replace("<", "\\u003c"),
        noise=noise,
        image=None if image is None else base64.b64encode(image).decode(),
        grid=grid,
    )


def _plain(routed: Routed) -> dict[str, Any]:
    return {
        "tokens": routed.pieces,
        "source": routed.source_T.tolist(),
        "layers": [
            {
                "experts": layer.expert_TK.tolist(),
                "codes": None if layer.code_T is None else layer.code_T.tolist(),
                "margin": _rounded(layer.margin_T),
                "distance": _rounded(layer.distance_T),
            }
            for layer in routed.layers
        ],
    }


def _changed(one: Shown) -> list[list[int]]:
    """Per layer the places of the noised tokens that go elsewhere."""
    return [layer_T.nonzero()[0].tolist() for layer_T in changed(one.clean, one.noised)]


def _rounded(value_T: Any) -> list[float] | None:
    return None if value_T is None else [round(float(value), DIGITS) for value in value_T]
