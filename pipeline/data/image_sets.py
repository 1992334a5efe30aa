"""Image sets by name, as torchvision and scikit-learn have them, or by path.

Shapes: N images, H height, W width.
"""

import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from filelock import FileLock
from torchvision import datasets
from torchvision.transforms.v2 import functional

from pipeline.data import archives
from pipeline.data.batches import generator
from pipeline.data.corpora import exists
from pipeline.data.image_files import ARRAYS, FOLDERS, Stored, StoredSet, read_folder, read_npz, reason
from pipeline.errors import Failure, UsageError
from pipeline.files import nearest_path

TEST_SHARE = 0.2  # of a set that comes without splits, such as digits

# What torchvision raises for files that are missing, cut off or of another kind.
_UNUSABLE = (
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    tarfile.TarError,
    zlib.error,
)


class Published(NamedTuple):
    """A set that torchvision reads: its class, what to call it with for each split, and the files it is made of.

    `place` is where below the set's own folder the files belong, `files` the sha256 of each by its URL.
    """

    kind: Callable[..., datasets.VisionDataset]
    splits: dict[str, dict[str, Any]]
    files: dict[str, str]
    place: str = "."


_FLAG = {"train": {"train": True}, "test": {"train": False}}
_SPLIT = {"train": {"split": "train"}, "test": {"split": "test"}}
_CIFAR = "https://www.cs.toronto.edu/~kriz"
_SVHN = "http://ufldl.stanford.edu/housenumbers"
_FASHION = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com"

PUBLISHED = {
    # sha256 of these two: keras/src/datasets/cifar10.py and cifar100.py of github.com/keras-team/keras.
    "cifar10": Published(
        datasets.CIFAR10,
        _FLAG,
        {f"{_CIFAR}/cifar-10-python.tar.gz": "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce"},
    ),
    "cifar100": Published(
        datasets.CIFAR100,
        _FLAG,
        {f"{_CIFAR}/cifar-100-python.tar.gz": "85cd44d02ba6437773c5bbd22e183051d648de2e7d6b014e1ef29b855ba677a7"},
    ),
    # sha256 of the others: tensorflow_datasets/url_checksums of github.com/tensorflow/datasets.
    "stl10": Published(
        datasets.STL10,
        _SPLIT,
        {
            "http://ai.stanford.edu/~acoates/stl10/stl10_binary.tar.gz": (
                "f31fd99273a1acb8609c8db427cebb1de3f71de77758cdc0e22956e1289b9866"
            )
        },
    ),
    "svhn": Published(
        datasets.SVHN,
        _SPLIT,
        {
            f"{_SVHN}/train_32x32.mat": "435e94d69a87fde4fd4d7f3dd208dfc32cb6ae8af2240d066de1df7508d083b8",
            f"{_SVHN}/test_32x32.mat": "cdce80dfb2a2c4c6160906d0bd7c68ec5a99d7ca4831afa54f09182025b6a75b",
        },
    ),
    "fashionmnist": Published(
        datasets.FashionMNIST,
        _FLAG,
        {
            f"{_FASHION}/train-images-idx3-ubyte.gz": "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
            f"{_FASHION}/train-labels-idx1-ubyte.gz": "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
            f"{_FASHION}/t10k-images-idx3-ubyte.gz": "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
            f"{_FASHION}/t10k-labels-idx1-ubyte.gz": "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
        },
        "FashionMNIST/raw",
    ),
}
SETS = ("digits", *PUBLISHED, "imagenet")


def image_source(name: str, root: Path) -> Path:
    """The file or folder that images are read from: that of a set by name, else a path relative to `root`.

    digits is part of scikit-learn and has none: what is named for it does not exist.
    """
    return archives.folder(root) / name if name in SETS else root / name


def stored_images(source: str, root: Path) -> StoredSet:
    """The images of a set by name, downloaded if need be, or of a path (relative to `root`): a folder or an .npz.

    Where the one split beside train is for validation, as in ImageNet, whose test has no labels, it is given as test.
    Raises UsageError for a name that is neither, Failure for data that cannot be used.
    """
    path = image_source(source, root)
    if source == "digits":
        found = _digits()
    elif source in PUBLISHED:
        found = _published(source, path)
    elif source == "imagenet":
        found = _imagenet(path)
    elif not exists(path):
        raise UsageError(
            f"data has '{source}': neither images by name ({', '.join(SETS)}) nor an existing path"
            f"{nearest_path(source, root, SETS)}"
        )
    elif path.is_dir():
        found = read_folder(path)
    elif path.suffix.lower() == ".npz":
        found = read_npz(path)
    else:
        raise UsageError(f"data has '{source}': expected a folder with {FOLDERS}, or an .npz with {ARRAYS}")
    for split, stored in found.splits.items():
        wrong = (stored.labels_N < 0) | (stored.labels_N >= len(found.classes))
        if wrong.any():
            row = int(wrong.argmax())
            raise Failure(
                f"{stored.name(row)}: label {stored.labels_N[row]} in {split} is none of the {len(found.classes)} classes, "
                "which are counted from 0; mend the labels"
            )
        if not len(stored.labels_N):
            raise Failure(f"{found.name}: the {split} split is empty; give it at least one image of each class")
    return found


def held_out(labels_N: np.ndarray, share: float) -> np.ndarray:
    """Which images (N,) to hold out: of each class about `share`, drawn once and for all; one at least if there are two."""
    held_N = np.zeros(len(labels_N), dtype=bool)
    for label in np.unique(labels_N):
        (rows,) = np.nonzero(labels_N == label)
        count = min(max(1, round(share * len(rows))), len(rows) - 1)
        held_N[generator(0, int(label), stream=5).permutation(rows)[:count]] = True
    return held_N


def _digits() -> StoredSet:
    """The 1,797 digits of scikit-learn, 8 x 8 with 17 levels of grey; a fifth of each class is for the test."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels_N1HW = torch.from_numpy(np.round(digits.images * (255 / 16)).astype(np.uint8)[:, None])
    test_N = held_out(digits.target, TEST_SHARE)

    def split(rows: np.ndarray) -> Stored:
        return Stored(digits.target[rows].astype(np.int64), lambda i: pixels_N1HW[rows[i]], lambda i: f"digits, image {rows[i]}")

    splits = {"train": split(np.nonzero(~test_N)[0]), "test": split(np.nonzero(test_N)[0])}
    return StoredSet("digits", tuple(map(str, digits.target_names)), splits)


def _published(name: str, folder: Path) -> StoredSet:
    """A set that torchvision unpacks and checks against its own MD5 sums before it unpickles anything."""
    kind, splits, files, place = PUBLISHED[name]

    def read(download: bool) -> dict[str, Any]:
        return {split: kind(folder, download=download, **chosen) for split, chosen in splits.items()}

    try:
        found = read(download=False)
    except _UNUSABLE:
        try:
            for url, sha256 in files.items():
                archives.fetch(url, sha256, folder / place)
        except Failure as error:
            needed = ", ".join(map(archives.file_name, files))
            raise Failure(f"{name} needs {needed} in {folder / place}: {error}") from None
        try:
            with FileLock(folder / ".lock"):
                found = read(download=True)
        except _UNUSABLE as error:
            raise Failure(
                f"{folder}: {name} cannot be unpacked or read there ({reason(error)}); "
                "remove everything but the archives, free space, then run again"
            ) from None

    def stored(split: str) -> Stored:
        images = found[split]
        labels = images.targets if hasattr(images, "targets") else images.labels
        return Stored(
            np.asarray(labels, dtype=np.int64),
            lambda i: functional.pil_to_tensor(images[i][0]),
            lambda i: f"{folder}, image {i} of {split}",
        )

    # SVHN names no classes: its digits are their own names.
    classes = getattr(found["train"], "classes", range(10))
    return StoredSet(name, tuple(map(str, classes)), {split: stored(split) for split in splits})


def _imagenet(folder: Path) -> StoredSet:
    """ImageNet's folders of classes, which are named by WordNet; torchvision unpacks its archives where they are not yet."""
    for split in ("train", "val"):
        part = folder / split
        if not part.is_dir():
            try:
                datasets.ImageNet(folder, split)
            except _UNUSABLE as error:
                raise Failure(
                    f"imagenet: put train/<class>/ and val/<class>/, or ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and "
                    f"ILSVRC2012_devkit_t12.tar.gz of image-net.org, into {folder} ({reason(error)})"
                ) from None
        # Torchvision takes a folder for whole once it is there.
        if left := [file for file in part.iterdir() if file.suffix in (".tar", ".JPEG")]:
            raise Failure(f"{left[0]}: left over from unpacking that was cut off; remove {part}, then run again")
    return read_folder(folder)
