"""Labelled images as arrays of one size, their files and batches. A batch is a pure function of (seed, step), as with texts.

Pixels are uint8 until a batch is made of them: float32 in [0, 1], which the model normalises itself.
Shapes: N images, B batch, C channels (1 grey, 3 rgb), H height and W width (both `size`).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipeline.data.batches import ALL, evenly, generator, shuffled
from pipeline.data.corpora import SPLITS
from pipeline.errors import Failure
from pipeline.files import read_json, write_json

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


def image_batch(
    images: Images, batch: int, seed: int, step: int, pad: int, flip: bool, part: slice = ALL
) -> tuple[Tensor, Tensor]:
    """Pixels (B, C, H, W), float32 in [0, 1], and labels (B,) of the batch of `step` (from 1), in shuffled epochs.

    With `part`, of these rows of the batch.

    Each image gets a border of `pad` black pixels and is cropped to its size at a random place; with `flip` every other one,
    by chance, is mirrored: the usual augmentation of CIFAR. The places come from a generator of (seed, step), where
    torchvision's random transforms would draw from torch's global one; called as functions, its transforms are also several
    times as fast, 2 ms for 128 images of CIFAR.
    """
    # Loading torchvision takes a second, which texts need not wait for.
    from torchvision.transforms.v2 import functional

    chosen = shuffled(len(images.labels_N), batch, seed, step)[part]
    draws = generator(seed, step, stream=4)
    corners_B2 = draws.integers(0, 2 * pad + 1, (batch, 2))[part].tolist()
    mirrored_B = torch.from_numpy(draws.random(batch)[part] < 0.5) & flip
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


def _open(path: Path) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise Failure(f"{path}: not found; run `vqmoe prepare`") from None
    except (OSError, ValueError, EOFError) as error:
        raise Failure(f"{path}: truncated or no file of images ({error}); {_AGAIN}") from None
