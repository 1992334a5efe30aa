"""Plots of the report: one colour per method everywhere, from a palette that colour-blind readers can tell apart."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure

# A label is a user's text: a dollar in it is no formula.
plt.rcParams["text.parse_math"] = False

# Okabe and Ito's palette and a grey, and a marker each, so that the lines differ in print too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442", "#8C8C8C")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "p")

# Scores of language models by their keys in metrics.
UNITS = {"bpc": "bits per character", "perplexity": "perplexity"}

Points = Sequence[Mapping[str, float]]


def styles(methods: Sequence[str]) -> dict[str, dict[str, str]]:
    """Colour and marker of each method, by its place in the list."""
    return {m: {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)]} for i, m in enumerate(methods)}


def training_curves(histories: Mapping[str, Sequence[Points]], unit: str, references: Mapping[str, float]) -> Figure:
    """Validation score in `unit` against the step; a line per method (mean over seeds), references dashed."""
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for method, style in styles(list(histories)).items():
        steps = [row["step"] for row in histories[method][0]]
        curves = np.array([[row[f"valid/{unit}"] for row in rows] for rows in histories[method]])
        _band(axes, steps, curves, method, style)
    for name, value in references.items():
        axes.axhline(value, color="0.55", linestyle="--", linewidth=1)
        axes.annotate(
            name, (1, value), xycoords=("axes fraction", "data"), xytext=(4, -3), textcoords="offset points", color="0.35"
        )
    axes.set(xlabel="training step", ylabel=f"validation {UNITS[unit]}", title="Pre-training")
    axes.legend(frameon=False)
    return _finish(figure)


def severity_curves(scores: Mapping[str, Mapping[str, Sequence[Points]]], unit: str, ylabel: str, title: str) -> Figure:
    """A panel per corruption: score against the share of units changed; `scores[kind][method]` lists each seed's points."""
    columns = min(3, len(scores))
    rows = -(-len(scores) // columns)
    figure, grid = plt.subplots(
        rows,
        columns,
        figsize=(max(5, 3.1 * columns + 0.6), 2.7 * rows + 1),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for axes, (kind, methods) in zip(grid.flat, scores.items(), strict=False):
        for method, style in styles(list(methods)).items():
            rates = [100 * point["rate"] for point in methods[method][0]]
            _band(axes, rates, np.array([[point["score"] for point in seed] for seed in methods[method]]), method, style)
        axes.set_title(kind, fontsize=10)
    for axes in list(grid.flat)[len(scores) :]:
        axes.set_visible(False)
    for column in range(columns):
        lowest = max(row for row in range(rows) if row * columns + column < len(scores))
        grid[lowest, column].set_xlabel(f"{unit} changed, %")
        grid[lowest, column].tick_params(labelbottom=True)
    for axes in grid[:, 0]:
        axes.set_ylabel(ylabel)
    figure.suptitle(title)
    # Below the panels: in one of them it would hide the lines of many methods.
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=min(5, 2 * columns), frameon=False)
    return _finish(figure)


def share_maps(shares: Mapping[str, np.ndarray], what: str) -> Figure:
    """A panel per model: share of assignments or tokens (percent) per layer (rows) and expert or code (columns)."""
    layers, width = (max(array.shape[axis] for array in shares.values()) for axis in (0, 1))
    columns = min(2, len(shares))
    rows = -(-len(shares) // columns)
    figure, grid = plt.subplots(
        rows,
        columns,
        figsize=(columns * min(max(4.0, 0.45 * width + 1), 12) + 1, rows * (0.42 * layers + 0.7) + 0.3),
        squeeze=False,
        layout="constrained",
    )
    largest = 100 * max(array.max() for array in shares.values())
    for axes, (name, array) in zip(grid.flat, shares.items(), strict=False):
        image = axes.imshow(100 * array, cmap="cividis", vmin=0, vmax=largest, aspect="auto")
        if array.shape[1] <= 16:
            _numbers(axes, 100 * array, 0.6 * largest)
        axes.set(title=name, ylabel="layer", yticks=range(array.shape[0]))
        axes.set_xticks(range(0, array.shape[1], max(1, array.shape[1] // 16)))
    for axes in list(grid.flat)[len(shares) :]:
        axes.set_visible(False)
    figure.supxlabel(what)
    # A token has one code, but goes to several experts.
    counted = "tokens" if what == "code" else "assignments"
    figure.colorbar(image, ax=list(grid.flat), aspect=40, label=f"share of {counted}, %")
    return figure


def confusion_maps(matrices: Mapping[str, np.ndarray], labels: Sequence[str], title: str) -> Figure:
    """A panel per method: share (percent) of the examples of each true label (rows) that got each label (columns)."""
    count = len(labels)
    # Few classes get cells for numbers, many get cells as high as a line of small print.
    cell, size = (0.55, 9) if count <= 12 else (0.17, 7)
    margin = 0.075 * max(map(len, labels)) * size / 9
    side = max(2.2, cell * count)
    columns = max(1, min(len(matrices), int((30 - margin) // side)))
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
            _numbers(axes, share, 36)
        axes.set_title(name)
        axes.set_xticks(range(count), labels, rotation=90, fontsize=size)
        axes.set_yticks(range(count), labels, fontsize=size)
    for axes in list(grid.flat)[len(matrices) :]:
        axes.set_visible(False)
    figure.supxlabel("predicted")
    figure.supylabel("true")
    figure.suptitle(title)
    figure.colorbar(image, ax=list(grid.flat), aspect=40, label="share of the true label's passages, %")
    return figure


def save(figure: Figure, path: Path, dpi: int) -> None:
    # No software version in the file: the same data gives the same bytes.
    figure.savefig(path, dpi=dpi, metadata={"Software": None})
    plt.close(figure)


def _band(axes: plt.Axes, x: Sequence[float], curves: np.ndarray, label: str, style: Mapping[str, str]) -> None:
    """Mean over seeds (first axis); with several seeds a band from the lowest to the highest."""
    axes.plot(x, curves.mean(0), label=label, markersize=4, linewidth=1.6, **style)
    if len(curves) > 1:
        axes.fill_between(x, curves.min(0), curves.max(0), color=style["color"], alpha=0.2, linewidth=0)


def _numbers(axes: plt.Axes, values: np.ndarray, bright: float) -> None:
    """Each cell's value in it, dark on cells that are bright."""
    for (row, column), value in np.ndenumerate(values):
        colour = "black" if value > bright else "white"
        axes.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=8, color=colour)


def _finish(figure: Figure) -> Figure:
    for axes in figure.axes:
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    return figure
