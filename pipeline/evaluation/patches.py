"""What routing does with an image: its patches tinted by expert or code, and what each code stands for.

Shapes: N images, C channels, H and W height and width, R and K rows and columns of patches, P patches of an image (row by row),
S side of a patch, M nearest patches of a code; X any shape.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from matplotlib.collections import PatchCollection
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from pipeline.evaluation.grid import Row
from pipeline.evaluation.pictures import CLEAN, Coded
from pipeline.evaluation.plots import COLOURS, plt

What = Literal["expert", "code"]

# Seven colours of Okabe and Ito's palette; wine for its black, which is no tint.
PALETTE = (*COLOURS[:6], "#F0E442", "#882255")
TINT = 0.65

INCHES = 1.5  # side of a panel
CHANGED = {"facecolor": "none", "edgecolor": "black"}
NOWHERE = {"facecolor": "none", "edgecolor": "0.3", "hatch": "//////", "linewidth": 0}


class Shown(NamedTuple):
    """An image as uint8 under one condition, `clean` or a corruption, and in each block where its patches went (-1: nowhere)."""

    pixels_CHW: np.ndarray
    name: str
    true: str
    predicted: str
    index_RK: Mapping[int, np.ndarray]


def patch_grid(images: Sequence[Shown], experts: int, what: What, title: str) -> Figure:
    """A row per image and condition: the picture, and a panel per block with each patch tinted by its expert or code.

    `clean` begins an image, its corrupted versions follow: in these, patches that went elsewhere are framed. More than eight
    experts have numbers in the patches too, where there is room. A code's hue tells its expert (code mod experts), its lightness
    tells codes of one expert apart.
    """
    blocks = list(images[0].index_RK)
    compared = list(_compared(images))
    # A narrow empty line between images.
    lines = [place + number for place, (number, _) in enumerate(compared)]
    heights = [1 if line in lines else 0.1 for line in range(lines[-1] + 1)]
    labels = [f"{shown.name}\ntrue: {shown.true}\npredicted: {shown.predicted}" for shown in images]
    widest = max(len(line) for label in labels for line in label.split("\n"))
    width = INCHES * (len(blocks) + 1) + 0.07 * widest + 0.3
    figure = plt.figure(figsize=(width, (INCHES + 0.1) * sum(heights) + 1.2), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.04, h_pad=0.03)
    grid = figure.add_gridspec(len(heights), len(blocks) + 1, height_ratios=heights)
    for line, label, shown, (_, clean) in zip(lines, labels, images, compared, strict=True):
        axes = _bare(figure.add_subplot(grid[line, 0], title="" if line else "picture"))
        axes.imshow(_rgb(shown.pixels_CHW))
        colour = "black" if shown.predicted == shown.true else COLOURS[1]
        axes.set_ylabel(label, rotation=0, ha="right", va="center", fontsize=9, color=colour)
        for column, block in enumerate(blocks, 1):
            axes = _bare(figure.add_subplot(grid[line, column], title="" if line else f"block {block}"))
            _tinted(axes, shown, block, experts, what)
            if shown is not clean:
                changed_RK = shown.index_RK[block] != clean.index_RK[block]
                _squares(axes, changed_RK, 0.84, **CHANGED, linewidth=6 * INCHES / max(changed_RK.shape))
                axes.set_xlabel(f"{100 * (1 - changed_RK.mean()):.0f} % the same", fontsize=8, labelpad=2)
    colours = tints(np.arange(experts), experts, what) if what == "expert" else []
    entries = {f"{expert}": Patch(color=colour) for expert, colour in enumerate(colours)}
    if len(images) > 1 + compared[-1][0]:
        entries["changed"] = Patch(**CHANGED)
    if any((index_RK < 0).any() for shown in images for index_RK in shown.index_RK.values()):
        entries[f"no {what}"] = Patch(**NOWHERE)
    figure.legend(
        entries.values(),
        entries.keys(),
        title="expert" if what == "expert" else None,
        loc="outside lower center",
        # A number and its colour take 0.6 inches, the longest entry an inch.
        ncols=int((width - 1) / 0.6),
        handlelength=1.4,
        columnspacing=1.2,
        frameon=False,
    )
    figure.suptitle(title)
    return figure


def code_pictures(codes: Mapping[int, Coded], experts: int, title: str) -> Figure:
    """A cell per code: large the mean of its patches, framed in the code's colour in `patch_grid`, and those nearest to it.

    Hatched: a code without patches. With four or eight experts a column has the codes of one.
    """
    columns = 4 if len(codes) <= 16 else 8
    rows = -(-len(codes) // columns)
    across = max(2, *(-(-len(coded.nearest_MCSS) // 2) for coded in codes.values()))
    figure, grid = plt.subplots(
        rows, columns, figsize=(columns * (0.28 * across + 0.8), rows * 0.85 + 0.5), squeeze=False, layout="constrained"
    )
    for axes, (code, coded) in zip(grid.flat, codes.items(), strict=False):
        _bare(axes).spines[:].set_visible(False)
        axes.set_title(f"code {code}, expert {code % experts}: {100 * coded.share:.3g} %", fontsize=8, pad=3)
        if coded.share:
            axes.imshow(_rgb(coded.mean_CSS), extent=(0, 2, 2, 0))
        else:
            axes.add_patch(Rectangle((0, 0), 2, 2, **NOWHERE))
        axes.add_patch(Rectangle((0, 0), 2, 2, fill=False, linewidth=2.5, edgecolor=tints(np.array(code), experts, "code")))
        for place, patch_CSS in enumerate(coded.nearest_MCSS):
            x, y = 2.2 + place % across, place // across
            axes.imshow(_rgb(patch_CSS), extent=(x + 0.04, x + 0.96, y + 0.96, y + 0.04))
        # Also where there is less to see: an image sets the limits to its own.
        axes.set(xlim=(-0.1, 2.2 + across), ylim=(2.1, -0.1), aspect="equal")
    for axes in list(grid.flat)[len(codes) :]:
        axes.set_visible(False)
    figure.suptitle(title)
    return figure


def patch_rows(images: Sequence[Shown], what: What) -> list[Row]:
    """A row per image, condition, block and patch, with its expert or code; images count from 0 in their order."""
    return [
        {"image": number, "condition": shown.name, "block": block, "row": row, "column": column, what: int(index)}
        for shown, (number, _) in zip(images, _compared(images), strict=True)
        for block, index_RK in shown.index_RK.items()
        for (row, column), index in np.ndenumerate(index_RK)
    ]


def code_rows(codes: Mapping[int, Coded]) -> list[Row]:
    """A row per code: its share, and mean and standard deviation over its mean patch's pixels in grey (0 to 255), if any."""
    return [
        {
            "code": code,
            "share": coded.share,
            "brightness": float(grey_SS.mean()) if coded.share else None,
            "contrast": float(grey_SS.std()) if coded.share else None,
        }
        for code, coded in codes.items()
        for grey_SS in [_grey(coded.mean_CSS)]
    ]


def tints(index_X: np.ndarray, experts: int, what: What) -> np.ndarray:
    """Colours (X, 3) of experts or codes: of up to eight experts those of a palette, else hues evenly around a circle."""
    if what == "expert" and experts <= len(PALETTE):
        return np.array([to_rgb(colour) for colour in PALETTE[:experts]])[index_X]
    if what == "expert":
        # Neighbours on the circle differ in lightness too.
        light_X = np.where(index_X % 2, 0.6, 0.78)
    else:
        # Multiples of the golden ratio mod 1: far apart however many codes there are.
        light_X = 0.42 + 0.48 * ((0.5 + 0.618 * (index_X // experts)) % 1)
    return _oklch(light_X, 0.13, 2 * np.pi * (index_X % experts) / experts)


def _oklch(light_X: np.ndarray, chroma: float, hue_X: np.ndarray) -> np.ndarray:
    """sRGB (X, 3) of a lightness, chroma and hue in Oklab, whose steps look even (Ottosson 2020); clipped to what sRGB has."""
    lab_X3 = np.stack([light_X, chroma * np.cos(hue_X), chroma * np.sin(hue_X)], -1)
    linear_X3 = ((lab_X3 @ _LMS) ** 3 @ _SRGB).clip(0, 1)
    return np.where(linear_X3 <= 0.0031308, 12.92 * linear_X3, 1.055 * linear_X3 ** (1 / 2.4) - 0.055)


# Rows: lightness, a, b to cube roots of cone responses; cone responses to linear red, green, blue.
_LMS = np.array([[1, 1, 1], [0.39633778, -0.10556135, -0.08948418], [0.21580376, -0.06385417, -1.29148555]])
_SRGB = np.array(
    [[4.07674166, -1.26843800, -0.00419609], [-3.30771159, 2.60975740, -0.70341861], [0.23096993, -0.34131940, 1.70761470]]
)


def _compared(images: Sequence[Shown]) -> Iterator[tuple[int, Shown]]:
    """For each version of an image the number of that image and its clean version."""
    number = -1
    for shown in images:
        if shown.name == CLEAN:
            number, clean = number + 1, shown
        assert number >= 0, f"{shown.name} before {CLEAN}"
        yield number, clean


def _tinted(axes: plt.Axes, shown: Shown, block: int, experts: int, what: What) -> None:
    """The image in grey under the tints; a patch is a unit of the axes."""
    index_RK = shown.index_RK[block]
    rows, columns = index_RK.shape
    extent = (-0.5, columns - 0.5, rows - 0.5, -0.5)
    # Black is a dark grey here: tints keep their hue.
    axes.imshow(_grey(shown.pixels_CHW), cmap="gray", vmin=-120, vmax=255, extent=extent)
    axes.imshow(np.dstack([tints(index_RK.clip(0), experts, what), TINT * (index_RK >= 0)]), extent=extent)
    _squares(axes, index_RK < 0, 1, **NOWHERE)
    points = 72 * INCHES / max(rows, columns)
    if what == "expert" and experts > len(PALETTE) and points > 9:
        for (row, column), index in np.ndenumerate(index_RK):
            if index >= 0:
                axes.text(column, row, f"{index}", ha="center", va="center", fontsize=0.5 * points)


def _squares(axes: plt.Axes, where_RK: np.ndarray, side: float, **look: Any) -> None:
    squares = [Rectangle((column - side / 2, row - side / 2), side, side) for row, column in np.argwhere(where_RK)]
    if squares:
        axes.add_collection(PatchCollection(squares, **look))


def _bare(axes: plt.Axes) -> plt.Axes:
    axes.set(xticks=[], yticks=[])
    axes.title.set_fontsize(10)
    return axes


def _rgb(pixels_CHW: np.ndarray) -> np.ndarray:
    """(H, W, 3) in [0, 1] of grey or coloured pixels (0 to 255)."""
    return np.broadcast_to(pixels_CHW / 255, (3, *pixels_CHW.shape[1:])).transpose(1, 2, 0)


def _grey(pixels_CHW: np.ndarray) -> np.ndarray:
    """Luma (H, W), 0 to 255 (ITU-R BT.601)."""
    return 255 * _rgb(pixels_CHW) @ (0.299, 0.587, 0.114)
