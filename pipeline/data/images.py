"""Labelled images as arrays of one size, their files and batches. A batch is a pure function of (seed, step), as with texts.

Pixels are uint8 until a batch is made of them: float32 in [0, 1], which the model normalises itself.
Shapes: N images, B batch, C channels (1 grey, 3 rgb), H height and W width (both `size`).
"""

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional

from pipeline.data.batches import evenly, generator, shuffled
from pipeline.data.corpora import SPLITS
from pipeline.data.image_files import ARRAYS, FOLDERS, Broken, Stored
from pipeline.data.image_sets import held_out, stored_images
from pipeline.errors import Failure
from pipeline.files import read_json, write_json
from pipeline.progress import Progress

CHANNELS = {"grey": 1, "rgb": 3}
_CHUNK = 1 << 22  # pixels that statistics look at in one go
_AGAIN = "run `vqmoe prepare` again"

View = Literal["grey", "rgb"]


class Images(NamedTuple):
    """Pixels, uint8, and the labels' indices, int64."""

    pixels_NCHW: np.ndarray
    labels_N: np.ndarray


@dataclass(frozen=True)
class ImageSet:
    """Class names in order of their index, the images of each split, and how many files were left out as broken."""

    classes: tuple[str, ...]
    splits: dict[str, Images]
    skipped: int = 0


def load_images(source: str, root: Path, view: View, size: int, valid: float, broken: Literal["refuse", "skip"]) -> ImageSet:
    """Splits of an image set by its name, or of a path (relative to `root`), see `stored_images`; each image as `fitted`.

    A set without a validation split has the share `valid` of each class of its training split held out.
    Raises UsageError for a name that is neither, Failure with file or class and remedy for data that cannot be used.
    """
    stored = stored_images(source, root)
    if missing := [split for split in ("train", "test") if split not in stored.splits]:
        raise Failure(f"{stored.name}: has no {missing[0]} split; expected {FOLDERS}, or an .npz with {ARRAYS}")
    if len(stored.classes) < 2:
        raise Failure(f"{stored.name}: has the one class '{stored.classes[0]}'; classification needs at least two")
    count = np.bincount(stored.splits["train"].labels_N, minlength=len(stored.classes))
    if not count.all():
        name = stored.classes[int(count.argmin())]
        raise Failure(f"{stored.name}: class '{name}' has no image in train; add some, or remove the class")
    rows = {split: (images, np.arange(len(images.labels_N))) for split, images in stored.splits.items()}
    if "valid" not in rows:
        train, every = rows["train"]
        held_N = held_out(train.labels_N, valid)
        rows |= {"train": (train, every[~held_N]), "valid": (train, every[held_N])}
        if not held_N.any():
            raise Failure(f"{stored.name}: no class has two images in train, one of them for validation; add some")
    splits, skipped = {}, 0
    with Progress(f"decode {source}", sum(len(chosen) for _, chosen in rows.values()), "image") as progress:
        for split in SPLITS:
            splits[split], lost = _decoded(*rows[split], view, size, broken, stored.classes, progress)
            skipped += lost
    return ImageSet(stored.classes, splits, skipped)


def load_shift(
    source: str, root: Path, view: View, size: int, classes: Sequence[str], broken: Literal["refuse", "skip"]
) -> tuple[Images, int]:
    """Other images of some of `classes`, as ImageNet-A and ImageNet-R are, and how many files were left out as broken.

    Labels are indices into `classes`.

    Reads the test split where there is one, else all of it, such as plain folders of classes.
    """
    found = stored_images(source, root)
    for name in found.classes:
        if name not in classes:
            raise Failure(
                f"{found.name}: class '{name}' is none of the {len(classes)} classes that are trained ({classes[0]} and others); "
                "rename it as there, or remove it"
            )
    images = found.splits.get("test", next(iter(found.splits.values())))
    index_L = np.array([classes.index(name) for name in found.classes])
    with Progress(f"decode {source}", len(images.labels_N), "image") as progress:
        shift, skipped = _decoded(images, np.arange(len(images.labels_N)), view, size, broken, found.classes, progress)
    return Images(shift.pixels_NCHW, index_L[shift.labels_N]), skipped


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


def write_images(folder: Path, images: Images) -> None:
    """Write pixels and labels, into a folder that is not final yet."""
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "pixels.npy", images.pixels_NCHW, allow_pickle=False)
    np.save(folder / "labels.npy", images.labels_N, allow_pickle=False)


def open_images(path: Path, classes: int | None = None) -> Images:
    """What `write_images` wrote into a folder, pixels mapped into memory: only what is read is loaded.

    With the number of classes, every label is checked against it.
    """
    pixels, labels = (_open(path / name) for name in ("pixels.npy", "labels.npy"))
    shape = pixels.shape
    if pixels.dtype != np.uint8 or len(shape) != 4 or shape[1] not in CHANNELS.values() or shape[2] != shape[3] or 0 in shape:
        raise Failure(f"{path / 'pixels.npy'}: holds {pixels.dtype} of shape {shape}, expected square images (uint8); {_AGAIN}")
    if labels.dtype != np.int64 or labels.shape != shape[:1]:
        raise Failure(
            f"{path / 'labels.npy'}: holds {labels.dtype} of shape {labels.shape}, expected {shape[0]} labels (int64); {_AGAIN}"
        )
    if classes is not None and not 0 <= labels.min() <= labels.max() < classes:
        raise Failure(f"{path / 'labels.npy'}: holds labels {labels.min()} to {labels.max()} of {classes} classes; {_AGAIN}")
    return Images(pixels, np.array(labels))


def write_set(folder: Path, images: ImageSet) -> None:
    """Write class names, and a folder of each split, into a folder that is not final yet."""
    for split, chosen in images.splits.items():
        write_images(folder / split, chosen)
    write_json(folder / "classes.json", list(images.classes))


def open_set(folder: Path) -> ImageSet:
    """What `write_set` wrote, pixels mapped into memory."""
    path = folder / "classes.json"
    classes = read_json(path, _AGAIN)
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise Failure(f"{path}: holds no list of class names; {_AGAIN}")
    return ImageSet(tuple(classes), {split: open_images(folder / split, len(classes)) for split in SPLITS})


def image_batch(images: Images, batch: int, seed: int, step: int, pad: int, flip: bool) -> tuple[Tensor, Tensor]:
    """Pixels (B, C, H, W), float32 in [0, 1], and labels (B,) of the batch of `step` (from 1), in shuffled epochs.

    Each image gets a border of `pad` black pixels and is cropped to its size at a random place; with `flip` every other one,
    by chance, is mirrored: the usual augmentation of CIFAR. The places come from a generator of (seed, step), where
    torchvision's random transforms would draw from torch's global one; called as functions, its transforms are also several
    times as fast, 2 ms for 128 images of CIFAR.
    """
    chosen = shuffled(len(images.labels_N), batch, seed, step)
    draws = generator(seed, step, stream=4)
    corners_B2 = draws.integers(0, 2 * pad + 1, (batch, 2)).tolist()
    mirrored_B = torch.from_numpy(draws.random(batch) < 0.5) & flip
    pixels_BCHW = torch.from_numpy(images.pixels_NCHW[chosen])
    size = list(pixels_BCHW.shape[2:])
    padded_BCHW = functional.pad(pixels_BCHW, [pad])
    crops = [functional.crop(image, *corner, *size) for image, corner in zip(padded_BCHW, corners_B2, strict=True)]
    pixels_BCHW = torch.stack(crops)
    pixels_BCHW[mirrored_B] = functional.horizontal_flip(pixels_BCHW[mirrored_B])
    return functional.to_dtype(pixels_BCHW, torch.float32, scale=True), torch.from_numpy(images.labels_N[chosen])


def spaced_images(images: Images, limit: int) -> Images:
    """At most `limit` images, evenly spaced over all."""
    rows = evenly(len(images.labels_N), limit)
    return Images(images.pixels_NCHW[rows], images.labels_N[rows])


def channel_statistics(images: Images) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation (C,) of each channel's pixels, float32 in units of [0, 1].

    A channel that never varies has deviation 1, so that it may be divided by. Reads the pixels once, a stretch at a time.
    """
    count, channels, height, width = images.pixels_NCHW.shape
    histogram_CV = np.zeros((channels, 256), dtype=np.int64)
    stretch = max(1, _CHUNK // (channels * height * width))
    for first in range(0, count, stretch):
        for channel in range(channels):
            values = images.pixels_NCHW[first : first + stretch, channel].ravel()
            histogram_CV[channel] += np.bincount(values, minlength=256)
    share_CV = histogram_CV / (count * height * width)
    value_V = np.arange(256) / 255
    mean_C = share_CV @ value_V
    deviation_C = np.sqrt((share_CV * (value_V - mean_C[:, None]) ** 2).sum(1))
    deviation_C[(histogram_CV > 0).sum(1) == 1] = 1.0
    return mean_C.astype(np.float32), deviation_C.astype(np.float32)


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


def _open(path: Path) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise Failure(f"{path}: not found; run `vqmoe prepare`") from None
    except (OSError, ValueError, EOFError) as error:
        raise Failure(f"{path}: truncated or no file of images ({error}); {_AGAIN}") from None
