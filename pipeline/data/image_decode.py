"""Image sets as arrays of one size, decoded once and for all.

Shapes: N images, C channels (1 grey, 3 rgb), H height and W width (both `size`).
"""

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional

from pipeline.data.corpora import SPLITS
from pipeline.data.image_files import ARRAYS, FOLDERS, Broken, Stored, StoredSet, decoded
from pipeline.data.image_sets import TEST_SHARE, held_out, stored_images
from pipeline.data.images import CHANNELS, Images, ImageSet, View
from pipeline.errors import Failure
from pipeline.progress import Progress


def load_images(source: str, root: Path, view: View, size: int, valid: float, broken: Literal["refuse", "skip"]) -> ImageSet:
    """Splits of an image set by its name, or of a path (relative to `root`): `stored_images`, `split_rows`, each as `fitted`.

    Raises UsageError for a name that is neither, Failure with file or class and remedy for data that cannot be used.
    """
    stored = stored_images(source, root)
    chosen = split_rows(stored, valid)
    splits, skipped = {}, 0
    with Progress(f"decode {source}", sum(len(rows) for _, rows in chosen.values()), "image") as progress:
        for split in SPLITS:
            splits[split], lost = _decoded(*chosen[split], view, size, broken, stored.classes, progress)
            skipped += lost
    return ImageSet(stored.classes, splits, skipped)


def split_rows(stored: StoredSet, valid: float) -> dict[str, tuple[Stored, np.ndarray]]:
    """Images to read from and which of them, for each split.

    Of a set without splits `TEST_SHARE` of each class is held out for test; of one without a validation split the share `valid`
    of each class of its training split. Raises Failure for a set that cannot be learnt from.
    """
    chosen = {split: (images, np.arange(len(images.labels_N))) for split, images in stored.splits.items()}
    if "all" in chosen:
        chosen = _divided(stored, *chosen["all"], TEST_SHARE, "test")
    if missing := [split for split in ("train", "test") if split not in chosen]:
        raise Failure(f"{stored.name}: has no {missing[0]} split; expected {FOLDERS}, or an .npz with {ARRAYS}")
    if len(stored.classes) < 2:
        raise Failure(f"{stored.name}: has the one class '{stored.classes[0]}'; classification needs at least two")
    images, train = chosen["train"]
    count = np.bincount(images.labels_N[train], minlength=len(stored.classes))
    if not count.all():
        name = stored.classes[int(count.argmin())]
        raise Failure(f"{stored.name}: class '{name}' has no image in train; add some, or remove the class")
    return chosen if "valid" in chosen else chosen | _divided(stored, images, train, valid, "valid")


def _divided(
    stored: StoredSet, images: Stored, every: np.ndarray, share: float, split: str
) -> dict[str, tuple[Stored, np.ndarray]]:
    held_N = held_out(images.labels_N[every], share)
    if not held_N.any():
        raise Failure(f"{stored.name}: no class has two images in train, one of them for {split}; add some")
    return {"train": (images, every[~held_N]), split: (images, every[held_N])}


def load_shift(
    source: str, root: Path, view: View, size: int, classes: Sequence[str], broken: Literal["refuse", "skip"]
) -> tuple[Images, int]:
    """Other images of some of `classes`, as ImageNet-A and ImageNet-R are, and how many files were left out as broken.

    Labels are indices into `classes`. Reads the test split where there is one, else all of it, such as plain folders of classes.
    """
    found = stored_images(source, root)
    for name in found.classes:
        if name not in classes:
            raise Failure(
                f"{found.name}: class '{name}' is none of the {len(classes)} classes that are trained ({classes[0]} and others); "
                "rename it as there, or remove it"
            )
    shift, skipped = _test_images(found, source, view, size, broken)
    index_L = np.array([classes.index(name) for name in found.classes])
    return Images(shift.pixels_NCHW, index_L[shift.labels_N]), skipped


def load_outside(
    source: str, root: Path, view: View, size: int, classes: Sequence[str], broken: Literal["refuse", "skip"]
) -> tuple[Images, int]:
    """Images of none of `classes`, as ImageNet-O is, and how many files were left out as broken; labels are its own.

    Reads what `load_shift` does.
    """
    found = stored_images(source, root)
    if known := [name for name in found.classes if name in classes]:
        raise Failure(f"{found.name}: class '{known[0]}' is trained, and data.outside is for others; remove it there")
    return _test_images(found, source, view, size, broken)


def fitted(image_CHW: Tensor, view: View, size: int) -> Tensor:
    """An image of any size as (C, size, size): the shorter side resized, with antialiasing, and the centre cut out.

    One that has this size is left as it is. Grey becomes three equal channels in the view rgb, colour its luminance
    (ITU-R 601-2, rounded) in the view grey.
    """
    channels = CHANNELS[view]
    if len(image_CHW) > channels:
        # Of uint8 torchvision cuts off what follows the point, and grey itself would come out darker.
        image_CHW = functional.rgb_to_grayscale(image_CHW.float()).round().to(torch.uint8)
    # Each of the two returns an image that has its size already unchanged.
    image_CHW = functional.center_crop(functional.resize(image_CHW, [size], antialias=True), [size, size])
    return image_CHW.expand(channels, size, size)


def read_image(path: Path, view: View, size: int) -> np.ndarray:
    """An image file's pixels (C, size, size) as `fitted`. Raises Failure if it cannot be read."""
    try:
        return fitted(decoded(str(path)), view, size).numpy()
    except Broken as error:
        raise Failure(f"{path}: {error}; name an image, such as a .png or .jpg") from None


def _test_images(found: StoredSet, source: str, view: View, size: int, broken: str) -> tuple[Images, int]:
    images = found.splits.get("test", next(iter(found.splits.values())))
    with Progress(f"decode {source}", len(images.labels_N), "image") as progress:
        return _decoded(images, np.arange(len(images.labels_N)), view, size, broken, found.classes, progress)


def _decoded(
    stored: Stored, rows: np.ndarray, view: View, size: int, broken: str, classes: Sequence[str], progress: Progress
) -> tuple[Images, int]:
    """The images of some rows, one at a time into their place, and how many were left out."""
    pixels_NCHW = _blank((len(rows), CHANNELS[view], size, size))
    kept: list[int] = []
    for row in rows.tolist():
        try:
            pixels_NCHW[len(kept)] = fitted(stored.read(row), view, size).numpy()
            kept.append(row)
        except Broken as error:
            if broken == "refuse":
                raise Failure(f"{stored.name(row)}: {error}; replace or remove it, or set prepare.broken: skip") from None
        progress.advance()
    for label in sorted({*stored.labels_N[rows].tolist()} - {*stored.labels_N[kept].tolist()}):
        where = stored.name(int(rows[stored.labels_N[rows] == label][0]))
        raise Failure(f"class '{classes[label]}': all images of a split are broken, such as {where}; replace them")
    return Images(pixels_NCHW[: len(kept)], stored.labels_N[kept]), len(rows) - len(kept)


def _blank(shape: tuple[int, ...]) -> np.ndarray:
    """Room for pixels in a file without a name, so that there may be more of them than memory."""
    try:
        file = tempfile.TemporaryFile()
        # Else a disk that is full would only be found, by a signal, once pixels are written there.
        os.posix_fallocate(file.fileno(), 0, int(np.prod(shape)))
        return np.memmap(file, np.uint8, shape=shape)
    except OSError as error:
        raise Failure(
            f"{tempfile.gettempdir()}: no room for {shape[0]} images ({error.strerror or error}); free space there, "
            "or name a folder with room in TMPDIR"
        ) from None
