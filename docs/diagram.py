"""Draw docs/images/method.svg: the VQMoE layer of params.yaml, with the names, shapes and losses of the layer as it is built.

Run from the repository: python docs/diagram.py
"""

from html import escape
from pathlib import Path

import torch

from pipeline import config
from pipeline.moe.dispatch import apply_experts
from pipeline.moe.layer import SETTINGS, VQMoE, build_layer
from pipeline.moe.routers.base import Sizes

ROOT = Path(__file__).parent.parent
OUT = ROOT / "docs/images/method.svg"
LINE = 23
# Of Okabe and Ito's colours, which all can tell apart: what stays after pre-training, what does not, and what is neither.
DISCRETE, ROUTED, OTHER = "#0072b2", "#d55e00", "#444444"

PAGE = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 1250 450">
<title>The VQMoE layer</title>
<style>
text {{ font: 17px sans-serif; text-anchor: middle }}
.title {{ font-weight: bold }}
.code {{ font: 16px monospace }}
.key {{ text-anchor: start }}
</style>
<defs>
{heads}
</defs>
<rect width="1250" height="450" fill="white"/>
{parts}
</svg>
"""


def draw() -> str:
    """The picture as SVG. The layer is built, and called in both of its modes, to know what is in it."""
    params = config.load(ROOT / "params.yaml", SETTINGS)
    settings, model = params.method("vqmoe"), params.model
    assert (settings.combine, settings.input) == ("distances", "residual"), "the picture is of another layer"
    layer = build_layer("vqmoe", settings, Sizes(model.width, model.experts, model.expert_width, vocabulary=0, dropout=0.0))
    x_ND = torch.randn(64, model.width)
    both, discrete = (layer.train()(x_ND, mode) for mode in layer.modes)
    asked = [f"{output.index_NK.shape[1]} of {model.experts} experts" for output in (both, discrete)]
    key = [f"{when} in mode {mode} ({experts})" for when, mode, experts in zip(("only", "also"), layer.modes, asked, strict=True)]
    title = {name: f"{name}: {type(module).__name__}" for name, module in layer.named_children()}
    shape = {name: f"{name.rpartition('.')[2]} {tuple(parameter.shape)}" for name, parameter in layer.named_parameters()}
    losses = [f"{loss.weight:g} {name}" for name, loss in both.losses.items()]
    inner = ("w1_EDH", "w2_EHD")
    embedded = "x_ND + code_embedding_CD[code_N]"
    parts = [
        arrow(DISCRETE, (130, 205), (176, 205)),
        arrow(ROUTED, (410, 175), (440, 175), (440, 80), (466, 80)),
        arrow(DISCRETE, (410, 235), (440, 235), (440, 325), (466, 325)),
        arrow(ROUTED, (830, 80), (860, 80), (860, 175), (886, 175)),
        arrow(DISCRETE, (830, 325), (860, 325), (860, 235), (886, 235)),
        arrow(DISCRETE, (1120, 205), (1146, 205)),
        arrow(OTHER, (295, 270), (295, 316)),
        box(20, 160, 110, 90, OTHER, "tokens", "x_ND", f"D = {model.width}"),
        box(180, 140, 230, 130, DISCRETE, title["quantizer"], shape["quantizer.codebook_CD"], "scores_NC", "code_N"),
        box(180, 320, 230, 110, OTHER, "losses", *losses),
        box(470, 20, 360, 120, ROUTED, "routed path", VQMoE._next_in_distance.__name__, "index_NK, weight_NK", "x_ND"),
        box(470, 265, 360, 120, DISCRETE, "discrete path", f"code_N % {model.experts}", shape["code_embedding_CD"], embedded),
        box(890, 140, 230, 130, OTHER, title["experts"], apply_experts.__name__, *(shape[f"experts.{name}"] for name in inner)),
        box(1150, 160, 80, 90, OTHER, "answer", "y_ND"),
    ]
    for y, colour, text in zip((340, 370), (ROUTED, DISCRETE), key, strict=True):
        parts.append(f'<polyline points="850,{y} 890,{y}" {stroke(colour)}/>')
        parts.append(f'<text x="900" y="{y + 5}" class="key">{text}</text>')
    heads = "\n".join(head(colour) for colour in (DISCRETE, ROUTED, OTHER))
    return PAGE.format(heads=heads, parts="\n".join(parts))


def box(x: int, y: int, width: int, height: int, colour: str, title: str, *lines: str) -> str:
    """A title and lines of code, in the middle of a frame."""
    middle, top = x + width // 2, y + (height - LINE * len(lines)) // 2 + 5
    texts = [f'<text x="{middle}" y="{top}" class="title" fill="{colour}">{escape(title)}</text>']
    for place, line in enumerate(lines, 1):
        texts.append(f'<text x="{middle}" y="{top + LINE * place}" class="code">{escape(line)}</text>')
    return "\n".join([f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="6" fill="white" {stroke(colour)}/>', *texts])


def arrow(colour: str, *points: tuple[int, int]) -> str:
    path = " ".join(f"{x},{y}" for x, y in points)
    return f'<polyline points="{path}" fill="none" {stroke(colour)} marker-end="url(#{colour[1:]})"/>'


def head(colour: str) -> str:
    size = 'markerWidth="8" markerHeight="8" refX="4" refY="4" orient="auto" markerUnits="userSpaceOnUse"'
    return f'<marker id="{colour[1:]}" {size}><path d="M0,0 L8,4 L0,8 z" fill="{colour}"/></marker>'


def stroke(colour: str) -> str:
    """The routed path is dashed as well."""
    return f'stroke="{colour}" stroke-width="2"' + (' stroke-dasharray="7 4"' if colour == ROUTED else "")


if __name__ == "__main__":
    OUT.write_text(draw(), encoding="utf-8")
