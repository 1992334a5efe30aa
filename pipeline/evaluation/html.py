"""The report as one page that needs nothing beside itself: no network, no scripts, pictures and data inside."""

import base64
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2

from pipeline.evaluation.exhibits import Exhibit
from pipeline.evaluation.findings import CLAIMANT, too_few
from pipeline.evaluation.grid import IMAGES, Grid
from pipeline.evaluation.summary import NAMES
from pipeline.evaluation.tables import Table
from pipeline.moe.layer import LAYERS, ROUTERS

# A line about each method for who did not read its paper; a new one's is the first of its docstring.
METHODS = {
    "vqmoe": "vector-quantized mixture of experts: a token's nearest code points to its expert, beside a routed path while "
    "pre-training (mode both) and alone after it (mode discrete)",
    "vqmoe_released": "the same with the choices of its authors' released code",
    "dense": "no choice of experts: one feed-forward as wide as the experts that the others use per token; the yardstick",
    "smoe": "sparse mixture of experts: a learned linear router, the k best experts",
    "xmoe": "cosines of tokens and experts in a small space decide",
    "stablemoe": "a router distilled into one that reads token ids, which is then frozen",
    "smoe_dropout": "a random frozen router, ever more experts while pre-training",
    "hyperrouter": "the same, with a router made by a frozen hypernetwork",
    "vmoe": "the vision mixture of experts: the k best experts, each with room for so many patches, the surest patches first",
    "softmoe": "no choice: every expert works on mixes of all patches of an image",
    "competesmoe": "at times all experts run, and the router learns whose answer is strongest",
}


class Shown(NamedTuple):
    """A figure as the page embeds it; `runs` are the MLflow runs that it was made of."""

    name: str
    title: str
    caption: str
    png: bytes
    csv: bytes
    runs: Sequence[str]

    @classmethod
    def of(cls, exhibit: Exhibit, figures: Path, data: Path) -> "Shown":
        """An exhibit whose files have been written to these folders."""
        png, rows = figures / f"{exhibit.name}.png", data / f"{exhibit.name}.csv"
        runs = list(dict.fromkeys(row["run_id"] for row in exhibit.rows))
        return cls(exhibit.name, exhibit.title, exhibit.caption, png.read_bytes(), rows.read_bytes(), runs)


def page(data: Any, grid: Grid, tables: Mapping[str, Table], csvs: Mapping[str, bytes], shown: Sequence[Shown]) -> str:
    """The page; `tables` and `csvs` by the names claims, methods, compute and pairs, `data` the params of the data."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
    )
    environment.filters["base64"] = lambda content: base64.b64encode(content).decode()
    # A number may break before its interval or its label, nowhere else.
    environment.filters["parts"] = lambda cell: re.split(r" (?=[\[(])", cell)
    first = grid.methods[0]
    return environment.get_template("report.html").render(
        data=data,
        grid=grid,
        tables=tables,
        csvs=csvs,
        shown=shown,
        methods={m: METHODS.get(m) or ((LAYERS | ROUTERS)[m].__doc__ or "").partition("\n")[0] for m in grid.methods},
        modes={m: list(dict.fromkeys(grid.modes(m))) for m in grid.methods},
        claimant=CLAIMANT,
        few=too_few(len(grid.seeds)),
        unit=NAMES[grid.unit],
        kinds={
            family: list(dict.fromkeys(kind for kind, _ in _all(grid, family)))
            for family in ("noise", "attack", "shift", "outside")
        },
        rates=sorted({rate for _, rate in _all(grid, "noise")}),
        sizes={m: grid.sample(first, m, "clean", "score").values_SU.shape[1] for m in grid.models},
        images=grid.base == IMAGES,
        units="images" if grid.base == IMAGES else "texts",
    )


def _all(grid: Grid, family: str) -> list[tuple[str, float]]:
    return [condition for method in grid.methods for model in grid.models for condition in grid.conditions(method, model, family)]
