"""Labelled images in files: a folder per class, or an .npz. Each image is decoded when it is asked for.

Shapes: N images, C channels (1 or 3), H height, W width.
"""

import os
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import datasets
from torchvision.transforms.v2 import functional

from pipeline.data import archives
from pipeline.data.corpora import named_splits
from pipeline.errors import Failure

FOLDERS = "train/<class>/ and test/<class>/ with image files in them, perhaps valid/<class>/; or <class>/ alone"
ARRAYS = "x_train, y_train, x_test, y_test, or of JPEG bytes blob, offset, y, is_test"


class Broken(Exception):
    """An image that cannot be decoded; says why."""


class Stored(NamedTuple):
    """The images of a split: labels, how to decode image i as uint8 (C, H, W), and what to call it in an error.

    `read` raises Broken.
    """

    labels_N: np.ndarray
    read: Callable[[int], Tensor]
    name: Callable[[int], str]


class StoredSet(NamedTuple):
    """Class names in the order of their labels, and the splits there are; `all` is one that is no split.

    `name` is what an error calls the set.
    """

    name: str
    classes: tuple[str, ...]
    splits: dict[str, Stored]


def read_folder(path: Path) -> StoredSet:
    """Folders of classes in a folder per split; or, with none of these, folders of classes."""
    _refuse_loops(path)
    names = named_splits(path, lambda name: (path / name).is_dir())
    try:
        found = {split: datasets.ImageFolder(path / name, loader=decoded) for split, name in (names or {"all": "."}).items()}
    except OSError as error:  # of a folder without classes, or a class without images, too
        raise Failure(f"{path}: {str(error).rstrip('.')}; expected {FOLDERS}") from None
    first, *others = found
    for other in others:
        for name in sorted({*found[first].classes} ^ {*found[other].classes})[:1]:
            there, lacking = (first, other) if name in found[first].classes else (other, first)
            raise Failure(
                f"{path}: class '{name}' is in {names[there]} but not in {names[lacking]}; every split needs the same classes"
            )

    def stored(images: datasets.ImageFolder) -> Stored:
        return Stored(np.array(images.targets, dtype=np.int64), lambda i: images[i][0], lambda i: images.samples[i][0])

    return StoredSet(str(path), tuple(found[first].classes), {split: stored(images) for split, images in found.items()})


def _refuse_loops(path: Path) -> None:
    """Torchvision follows links, and one that leads back would give it the same images again and again."""
    for folder, names, _ in os.walk(path, followlinks=True):
        for link in filter(Path.is_symlink, (Path(folder, name) for name in names)):
            above = [Path(folder), *Path(folder).parents]
            if any(link.samefile(place) for place in above[: above.index(path) + 1]):
                raise Failure(f"{link}: a link that leads back to a folder it lies in; remove it")


def read_npz(path: Path) -> StoredSet:
    """Arrays of images and labels per split, or the bytes of JPEG files one after the other; nothing is unpickled."""
    with archives.reading(path):
        file = np.load(path, allow_pickle=False)
        if not isinstance(file, np.lib.npyio.NpzFile):
            raise Failure(f"{path}: is one array, no .npz; expected {ARRAYS}")
        with file:
            there = set(file.files)
            classes = _array(path, file, "classes").astype(str) if "classes" in there else np.empty(0, str)
            splits = _jpegs(path, file) if {"blob", "offset"} <= there else _arrays(path, file)
    if not splits:
        raise Failure(f"{path}: expected {ARRAYS}; there are {', '.join(sorted(there)) or 'none'}")
    if classes.ndim != 1 or len({*classes}) != len(classes):
        raise Failure(f"{path}: classes names one twice, or is no plain list; give every label a name of its own")
    if not len(classes):  # those that are trained
        classes = np.arange(1 + next(iter(splits.values())).labels_N.max(initial=0)).astype(str)
    return StoredSet(str(path), tuple(classes.tolist()), splits)


def _array(path: Path, file: Any, name: str) -> np.ndarray:
    try:
        return file[name]
    except KeyError:
        raise Failure(f"{path}: has no {name}; expected {ARRAYS}") from None
    except ValueError as error:
        if "pickle" not in str(error):
            raise
        raise Failure(
            f"{path}: {name} holds Python objects, as images of different sizes do; store one size, or use a folder of files"
        ) from None


def _jpegs(path: Path, file: Any) -> dict[str, Stored]:
    """The images of one blob, image i from offset[i] to offset[i + 1]; without `is_test` there are no splits."""
    blob, offset = _array(path, file, "blob"), _array(path, file, "offset").astype(np.int64)
    labels_N = _labels(path, "y", _array(path, file, "y"), len(offset) - 1)
    if blob.dtype != np.uint8 or (np.diff(offset) < 0).any() or offset[0] < 0 or offset[-1] > len(blob):
        raise Failure(f"{path}: offset does not cut blob (uint8) into {len(labels_N)} images; write the file again")
    if "is_test" in file.files:
        test_N = _array(path, file, "is_test").astype(bool)
        if test_N.shape != labels_N.shape:
            raise Failure(f"{path}: is_test has shape {test_N.shape}, expected one value for each of {len(labels_N)} images")
        rows = {"train": np.nonzero(~test_N)[0], "test": np.nonzero(test_N)[0]}
    else:
        rows = {"all": np.arange(len(labels_N))}

    def stored(rows: np.ndarray) -> Stored:
        def read(i: int) -> Tensor:
            return decoded(BytesIO(blob[offset[rows[i]] : offset[rows[i] + 1]].tobytes()))

        return Stored(labels_N[rows], read, lambda i: f"{path}, image {rows[i]}")

    return {split: stored(chosen) for split, chosen in rows.items() if len(chosen)}


def _arrays(path: Path, file: Any) -> dict[str, Stored]:
    def stored(name: str) -> Stored:
        x = _array(path, file, f"x_{name}")
        last = x.ndim == 4 and x.shape[3] in (1, 3)
        if x.dtype != np.uint8 or not (x.ndim == 3 or last or (x.ndim == 4 and x.shape[1] in (1, 3))) or 0 in x.shape[1:]:
            raise Failure(
                f"{path}: x_{name} is {x.dtype} of shape {x.shape}, expected uint8 (N, H, W), (N, H, W, C) or (N, C, H, W) "
                "with C 1 or 3; convert it"
            )
        x_NCHW = x[:, None] if x.ndim == 3 else np.moveaxis(x, 3, 1) if last else x
        return Stored(
            _labels(path, f"y_{name}", _array(path, file, f"y_{name}"), len(x)),
            lambda i: torch.from_numpy(np.ascontiguousarray(x_NCHW[i])),
            lambda i: f"{path}, image {i} of x_{name}",
        )

    splits = {split: stored(name) for split, name in named_splits(path, lambda name: f"x_{name}" in file.files).items()}
    shapes = {split: tuple(images.read(0).shape) for split, images in splits.items() if len(images.labels_N)}
    if len({*shapes.values()}) > 1:
        sizes = ", ".join(f"{split} {'x'.join(map(str, shape))}" for split, shape in shapes.items())
        raise Failure(
            f"{path}: images of different sizes (channels x height x width: {sizes}); store one, or use a folder of files"
        )
    return splits


def _labels(path: Path, name: str, y: np.ndarray, count: int) -> np.ndarray:
    y_N = y[:, 0] if y.ndim == 2 and y.shape[1] == 1 else y
    if y_N.shape != (count,) or not np.issubdtype(y.dtype, np.integer):
        raise Failure(f"{path}: {name} is {y.dtype} of shape {y.shape}, expected {count} whole numbers, a label for each image")
    return y_N.astype(np.int64)


def decoded(file: str | BytesIO) -> Tensor:
    """uint8 (C, H, W): one channel of a grey image, else three; transparency is dropped."""
    try:
        with Image.open(file) as image:
            if image.mode[0] in "IF":  # Pillow would not scale these but cut them off at 255
                raise Broken(f"its pixels have more than 8 bits (Pillow's mode {image.mode})")
            return functional.pil_to_tensor(image.convert("L" if image.mode in ("1", "L") else "RGB"))
    except Broken:
        raise
    except Exception as error:  # every decoder has errors of its own
        raise Broken(f"cannot be decoded ({reason(error)})") from None


def reason(error: Exception) -> str:
    """The first line of what an error says."""
    return (str(error) or type(error).__name__).splitlines()[0]
