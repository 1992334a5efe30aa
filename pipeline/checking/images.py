"""Labelled images: sizes, modes, what cannot be read, what repeats, and a size that fits."""

import hashlib
from array import array
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from pipeline.checking.findings import DRAWN, Findings, Known, classes, duplicates, percent, place_in, spread, task_name
from pipeline.data.image_decode import fitted, split_rows
from pipeline.data.image_files import Broken, Stored
from pipeline.data.image_sets import stored_images
from pipeline.data.tables import SPLITS
from pipeline.errors import Failure
from pipeline.progress import Progress

VALID = 0.15  # prepare.valid
SMALLEST, LARGEST = 8, 64  # pixels of a side: what a model takes, and what two cores can do
PATCHES = 7  # along a side, at least
LONG, OFTEN = 1.5, 0.05  # the longer side over the shorter, and the share of such images, that deserve a warning


def check(found: Findings, root: Path) -> None:
    """Decodes every image twice as far as it must: its header, from which the size follows, and then whole."""
    stored = stored_images(found.path, root)
    chosen = split_rows(stored, VALID)
    if "all" in stored.splits:
        found.facts["form"] += DRAWN
    every = [(split, images, row) for split, (images, rows) in chosen.items() for row in rows.tolist()]
    sizes: list[tuple[int, int]] = []
    modes: Counter[str] = Counter()
    broken: dict[str, str] = {}
    hashes, exact, labels, kept = ({split: array(kind) for split in SPLITS} for kind in "QQqq")
    with Progress("check", total=2 * len(every), unit="image") as progress:
        for _, images, row in every:
            if header := _header(images, row):
                sizes.append(header[0])
                modes[header[1]] += 1
            progress.advance()
        if not sizes:
            raise Failure(f"{root / found.path}: no image can be read; replace them")
        shorter = np.array(sizes).min(1)
        size = int(np.clip(np.median(shorter) // 4 * 4, SMALLEST, LARGEST))
        view = "grey" if {*modes} <= {"1", "L"} else "rgb"
        for split, images, row in every:
            try:
                image = images.read(row)
                hashes[split].append(_hash(fitted(image, view, size)))
                exact[split].append(_hash(image))
                labels[split].append(int(images.labels_N[row]))
                kept[split].append(row)
            except Broken as error:
                broken[images.name(row)] = str(error)
            progress.advance()
    for split, (images, rows) in chosen.items():
        for label in sorted({*images.labels_N[rows].tolist()} - {*labels[split]}):
            where = images.name(int(rows[images.labels_N[rows] == label][0]))
            raise Failure(f"class '{stored.classes[label]}': all images of a split are broken, such as {where}; replace them")
    found.facts["splits"] = {split: {"images": len(labels[split])} for split in SPLITS}
    width, height = np.array(sizes).T
    found.facts["sizes"] = {"width": spread(width), "height": spread(height), "different": len({*sizes})}
    found.facts["modes"] = dict(modes.most_common())
    found.facts["unreadable"] = broken
    count = {split: Counter(labels[split]) for split in SPLITS}
    classes(found, "images", {name: {split: count[split][i] for split in SPLITS} for i, name in enumerate(stored.classes)})
    known = {}
    for split, (images, _) in chosen.items():

        def names(some: list[int], images: Stored = images, rows: Sequence[int] = kept[split]) -> list[str]:
            return [place_in(root / found.path, images.name(rows[place])) for place in some]

        known[split] = Known(*(np.array(of[split]) for of in (hashes, exact, labels)), names)
    duplicates(found, "images", known, "once they have one size and colour", labelled=True)
    if broken:
        name, reason = next(iter(broken.items()))
        found.warn(f"{len(broken):,} unreadable images are left out, such as {name} ({reason}); replace them")
    if (long := float((np.array(sizes).max(1) > LONG * shorter).mean())) > OFTEN:
        found.warn(f"{percent(long)} of the images are {LONG} times as long one way as the other: their ends are cut off")
    if clear := sum(count for mode, count in modes.items() if mode.lower().endswith("a")):
        found.warn(f"{clear:,} images are transparent in places, where the colour stored there will show; fill it in")
    found.preset = "vision/digits" if view == "grey" else "vision/cifar10"
    found.params = {
        "data": {
            "corpus": found.path,
            "view": view,
            "tasks": {task_name(root / found.path): found.path},
            "shifts": {},
            "outside": {},
        },
        "prepare": {"size": size, "valid": VALID, "broken": "skip" if broken else "refuse"},
        "model": {"patch": _patch(size)},
    }
    if (half := int(np.median(shorter))) > LARGEST:
        found.notes["prepare.size"] = f"half of the images have {half} and more; larger ones take longer"


def _header(images: Stored, row: int) -> tuple[tuple[int, int], str] | None:
    """Width, height and Pillow's mode of an image that can be read; of one in a file, as it says at its beginning."""
    file = Path(images.name(row))
    try:
        if file.is_file():
            with Image.open(file) as image:
                return image.size, image.mode
        channels, height, width = images.read(row).shape
        return (width, height), "L" if channels == 1 else "RGB"
    except Exception:  # every decoder has errors of its own; decoding all of it will tell
        return None


def _hash(image_CHW: Tensor) -> int:
    content = f"{tuple(image_CHW.shape)}".encode() + image_CHW.contiguous().numpy().tobytes()
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest())


def _patch(size: int) -> int:
    """Pixels of a patch's side: the most that divide an image's and leave enough patches, but no single ones."""
    return max(patch for patch in range(2, size) if size % patch == 0 and (patch == 2 or size // patch >= PATCHES))
