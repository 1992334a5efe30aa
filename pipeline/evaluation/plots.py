"""Plots of the report: one colour per method everywhere, from a palette that colour-blind readers can tell apart."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import offset_copy

from pipeline.moe.layer import SETTINGS

# A label is a user's text: a dollar in it is no formula.
plt.rcParams["text.parse_math"] = False

# Okabe and Ito's palette, its yellow, which is too bright for lines, exchanged for wine, and an indigo; and a marker each, so
# that the lines differ in print too.
COLOURS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#000000",
    "#882255",
    "#4422CC",
    "#999933",
    "#7F7F7F",
)
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "p", "<", "h")


class Curve(NamedTuple):
    """A line through (x, y) and, where there are ends, a band from low to high."""

    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None


class Point(NamedTuple):
    """A point and, where there are ends, a bar from low to high; hollow in a method's other mode."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None
    hollow: bool = False


class Panel(NamedTuple):
    """Axes of a figure: a title, what the axes say, and what each method shows there, beside it perhaps as thin dashed lines.

    The y axis begins at `bottom`, where there is one, or at what is shown below it.
    """

    title: str
    xlabel: str
    ylabel: str
    methods: Mapping[str, Curve] | Mapping[str, Sequence[Point]]
    dashed: Mapping[str, Curve] = {}
    bottom: float | None = None


class Map(NamedTuple):
    """A heat map: rows, columns, values (NaN where there are none), their unit and digits."""

    title: str
    rows: Sequence[str]
    columns: Sequence[str]
    values: np.ndarray
    unit: str
    digits: int


class Bars(NamedTuple):
    """FLOPs saved against each thing compared with, in percent; and against the first the time, with low and high end."""

    title: str
    names: Sequence[str]
    flops: Sequence[float]
    time: tuple[float, float, float] | None


def styles(methods: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Colour and marker of each method, by its place among all methods: the same in every experiment.

    Where there are more methods than colours, those that share one have markers of their own.
    """
    places = {method: place for place, method in enumerate(SETTINGS)}
    turns = {method: divmod(place, len(COLOURS)) for method, place in places.items()}
    return {m: {"color": COLOURS[turns[m][1]], "marker": MARKERS[sum(turns[m]) % len(MARKERS)]} for m in methods}


def curves(panels: Sequence[Panel], title: str, references: Mapping[str, float] | None = None, dashed: str = "") -> Figure:
    """A line per method in every panel; references are dashed lines, named at their right ends; `dashed` is for the legend."""
    figure, axes_of = _grid(panels, sharex=True)
    places = sorted({float(x) for panel in panels for curve in panel.methods.values() for x in curve.x})
    ticks = places[:: -(-len(places) // 7)]
    for axes, panel in zip(axes_of, panels, strict=True):
        # The bands of many methods lie on each other.
        alpha = 0.2 if len(panel.methods) < 5 else 0.08
        for method, style in styles(panel.methods).items():
            curve = panel.methods[method]
            axes.plot(curve.x, curve.y, label=method, markersize=5, linewidth=1.6, **style)
            if curve.low is not None:
                axes.fill_between(curve.x, curve.low, curve.high, color=style["color"], alpha=alpha, linewidth=0)
            if method in panel.dashed:
                beside = panel.dashed[method]
                axes.plot(beside.x, beside.y, color=style["color"], linestyle="--", linewidth=1)
        for name, value in (references or {}).items():
            axes.axhline(value, color="0.55", linestyle="--", linewidth=1)
            axes.annotate(
                name, (1, value), xycoords=("axes fraction", "data"), xytext=(4, -3), textcoords="offset points", color="0.35"
            )
        if any(other.dashed for other in panels):
            axes.plot([], [], color="0.4", linestyle="--", linewidth=1, label=dashed)
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.tick_params(labelbottom=True)
        _begin(axes, panel.bottom)
    return _finish(figure, axes_of, title)


def points(panels: Sequence[Panel], title: str, apart: float = 0) -> Figure:
    """Points of each method in every panel; those of one method are joined where one is hollow.

    Each method is drawn `apart` points (1/72 inch) to the right of the one before, to tell those of the same x apart.
    """
    figure, axes_of = _grid(panels)
    hollow = any(point.hollow for panel in panels for shown in panel.methods.values() for point in shown)
    for axes, panel in zip(axes_of, panels, strict=True):
        for index, (method, style) in enumerate(styles(panel.methods).items()):
            shown = panel.methods[method]
            aside = (index - (len(panel.methods) - 1) / 2) * apart
            style["transform"] = offset_copy(axes.transData, figure, aside, units="points")
            # What is drawn aside has no part in the limits of the axes.
            axes.update_datalim([(p.x, y) for p in shown for y in (p.y, p.low, p.high) if y is not None])
            if any(point.hollow for point in shown):
                axes.plot([p.x for p in shown], [p.y for p in shown], **style | {"marker": "", "linewidth": 1, "zorder": 1})
            for place, point in enumerate(shown):
                error = None if point.low is None else [[max(point.y - point.low, 0)], [max(point.high - point.y, 0)]]
                axes.errorbar(
                    point.x,
                    point.y,
                    error,
                    linestyle="",
                    markersize=7,
                    capsize=3,
                    label=None if place else method,
                    markerfacecolor="white" if point.hollow else style["color"],
                    **style,
                )
        for face, mode in (("0.4", "mode of inference"), ("white", "mode of pre-training")) if hollow else ():
            axes.plot([], [], "o", color="0.4", markerfacecolor=face, markersize=7, label=mode)
        axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
        axes.margins(0.18, 0.12)
        _begin(axes, panel.bottom)
    return _finish(figure, axes_of, title)


def heat_maps(maps: Sequence[Sequence[Map]], title: str) -> Figure:
    """Rows of panels, a colour bar each; a map without columns is left out."""
    widths = [max(len(shown.columns) for shown in column) for column in zip(*maps, strict=True)]
    heights = [0.38 * len(row[0].rows) + 1.5 for row in maps]
    figure, grid = plt.subplots(
        len(maps),
        len(widths),
        figsize=(0.72 * sum(widths) + 3.2 * len(widths), sum(heights) + 0.5),
        width_ratios=[0.72 * width + 1 for width in widths],
        height_ratios=heights,
        squeeze=False,
        layout="constrained",
    )
    for axes, shown in zip(grid.flat, itertools.chain(*maps), strict=True):
        if not shown.columns:
            axes.set_visible(False)
            continue
        # Not finer than the numbers in the cells.
        low, high = min(0.0, np.nanmin(shown.values)), max(0.01, np.nanmax(shown.values))
        image = axes.imshow(shown.values, cmap="cividis", vmin=low, vmax=high, aspect="auto")
        _numbers(axes, image, shown.digits)
        axes.set_title(shown.title, fontsize=10)
        axes.set_xticks(range(len(shown.columns)), shown.columns, rotation=30, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(len(shown.rows)), shown.rows)
        figure.colorbar(image, ax=axes, label=shown.unit, pad=0.02)
    figure.suptitle(title)
    return figure


def saving_bars(panels: Sequence[Bars], title: str, claimed: float) -> Figure:
    """A panel each: horizontal bars in percent; a dashed line at what is claimed."""
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    height = 0.4 * max(len(panel.names) for panel in panels) + 1.2
    figure, grid = plt.subplots(
        rows, columns, figsize=(4.8 * columns + 0.6, height * rows + 0.9), sharex=True, squeeze=False, layout="constrained"
    )
    used = list(grid.flat)[: len(panels)]
    for axes, panel in zip(used, panels, strict=True):
        place = np.arange(len(panel.names))
        axes.barh(place - 0.2 * (place == 0) * bool(panel.time), panel.flops, 0.38, color="0.35", label="FLOPs")
        if panel.time:
            value, low, high = panel.time
            axes.barh(0.2, value, 0.38, xerr=[[value - low], [high - value]], capsize=3, color="0.72", label="time")
        axes.axvline(claimed, color="0.3", linestyle="--", linewidth=1, label=f"{claimed:g} % claimed")
        axes.axvline(0, color="0.2", linewidth=0.8)
        axes.set_yticks(place, panel.names)
        axes.invert_yaxis()
        axes.set_title(panel.title, fontsize=10)
        axes.tick_params(labelbottom=True)
        axes.set_xlabel("saved, %")
    for axes in list(grid.flat)[len(panels) :]:
        axes.set_visible(False)
    return _finish(figure, used, title)


def share_maps(shares: Mapping[str, np.ndarray], what: str, title: str) -> Figure:
    """A panel per model: share of assignments or tokens (percent) per layer (rows) and expert or code (columns)."""
    layers, width = (max(array.shape[axis] for array in shares.values()) for axis in (0, 1))
    columns = min(2, len(shares))
    rows = -(-len(shares) // columns)
    figure, grid = plt.subplots(
        rows,
        columns,
        figsize=(columns * min(max(4.0, 0.45 * width + 1), 12) + 1, max(2.6, rows * (0.42 * layers + 0.7) + 0.6)),
        squeeze=False,
        layout="constrained",
    )
    largest = 100 * max(array.max() for array in shares.values())
    for axes, (name, array) in zip(grid.flat, shares.items(), strict=False):
        image = axes.imshow(100 * array, cmap="cividis", vmin=0, vmax=largest, aspect="auto")
        if array.shape[1] <= 16:
            _numbers(axes, image)
        axes.set(title=name, ylabel="layer", yticks=range(array.shape[0]))
        axes.set_xticks(range(0, array.shape[1], max(1, array.shape[1] // 16)))
    for axes in list(grid.flat)[len(shares) :]:
        axes.set_visible(False)
    figure.supxlabel(what)
    figure.suptitle(title)
    # A token has one code, but goes to several experts.
    counted = "tokens" if what == "code" else "assignments"
    bar = figure.colorbar(image, ax=list(grid.flat), aspect=40, label=f"share of {counted}, %")
    for count in {array.shape[1] for array in shares.values()}:
        bar.ax.axhline(100 / count, color="white", linewidth=2)
    return figure


def confusion_maps(matrices: Mapping[str, np.ndarray], labels: Sequence[str], title: str) -> Figure:
    """A panel per method: share (percent) of the examples of each true label (rows) that got each label (columns)."""
    count = len(labels)
    # Few classes get cells for numbers, many get cells as high as a line of small print.
    cell, size = (0.55, 9) if count <= 12 else (0.17, 7)
    margin = 0.075 * max(map(len, labels)) * size / 9
    side = max(2.2, cell * count)
    columns = max(1, min(3, len(matrices), int((30 - margin) // side)))
    rows = -(-len(matrices) // columns)
    figure, grid = plt.subplots(
        rows,
        columns,
        figsize=(columns * side + margin + 1.6, rows * (side + margin + 0.3) + 0.7),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for axes, (name, matrix) in zip(grid.flat, matrices.items(), strict=False):
        share = 100 * matrix / matrix.sum(1, keepdims=True).clip(min=1)
        # Brightness goes with the root of the share: a few percent of a class that go astray show.
        image = axes.imshow(share, cmap="cividis", norm=PowerNorm(0.5, vmin=0, vmax=100))
        if count <= 12:
            _numbers(axes, image)
        axes.set_title(name)
        axes.set_xticks(range(count), labels, rotation=90, fontsize=size)
        axes.set_yticks(range(count), labels, fontsize=size)
    for axes in list(grid.flat)[len(matrices) :]:
        axes.set_visible(False)
    figure.supxlabel("predicted")
    figure.supylabel("true")
    figure.suptitle(title)
    figure.colorbar(image, ax=list(grid.flat), aspect=40, label="share of the true label's examples, %")
    return figure


def save(figure: Figure, path: Path, dpi: int) -> None:
    # No software version in the file: the same data gives the same bytes.
    figure.savefig(path, dpi=dpi, metadata={"Software": None})
    plt.close(figure)


def _grid(panels: Sequence[Panel], sharex: bool = False) -> tuple[Figure, list[plt.Axes]]:
    """A figure with axes for the panels, titled and labelled; they share the y axis where all mean the same by it."""
    columns = min(3, len(panels)) if len(panels) != 4 else 2
    rows = -(-len(panels) // columns)
    size = (7, 4.4) if len(panels) == 1 else (3.3 * columns + 0.6, 2.7 * rows + 1.1)
    shared = len({panel.ylabel for panel in panels}) == 1
    figure, grid = plt.subplots(rows, columns, figsize=size, sharex=sharex, sharey=shared, squeeze=False, layout="constrained")
    for place, (axes, panel) in enumerate(zip(grid.flat, panels, strict=False)):
        axes.set_title(panel.title, fontsize=10)
        # Under the lowest panel of a column, where all say the same.
        if place + columns >= len(panels) or len({other.xlabel for other in panels}) > 1:
            axes.set_xlabel(panel.xlabel)
        if not (shared and place % columns):
            axes.set_ylabel(panel.ylabel)
    for axes in list(grid.flat)[len(panels) :]:
        axes.set_visible(False)
    return figure, list(grid.flat)[: len(panels)]


def _begin(axes: plt.Axes, bottom: float | None) -> None:
    """Begin the y axis at `bottom` or, where something is shown below it, there."""
    if bottom is not None:
        low, high = axes.dataLim.intervaly
        axes.set_ylim(bottom if low >= bottom else None, high + 0.06 * (high - bottom) if high > bottom else bottom + 1)


def _numbers(axes: plt.Axes, image: AxesImage, digits: int = 0) -> None:
    """Each cell's value in it, black or white, whichever stands out more; nothing where there is none."""
    for (row, column), value in np.ma.ndenumerate(image.get_array()):
        rgb = np.array(image.to_rgba(value)[:3])
        # Relative luminance (WCAG): on more than 0.18 black has the higher contrast.
        luminance = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4) @ (0.2126, 0.7152, 0.0722)
        colour = "black" if luminance > 0.18 else "white"
        axes.text(column, row, f"{value:z.{digits}f}", ha="center", va="center", fontsize=8, color=colour)


def _finish(figure: Figure, axes_of: Sequence[plt.Axes], title: str) -> Figure:
    """Title, light grid, and one legend for all panels below them: in one of them it would hide lines."""
    entries: dict[str, object] = {}
    for axes in axes_of:
        axes.grid(alpha=0.25)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        entries |= {label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.suptitle(title)
    across = max(1, int(figure.get_size_inches()[0] / 1.7))
    figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=across, frameon=False)
    return figure
