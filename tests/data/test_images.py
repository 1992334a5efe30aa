import gzip
import hashlib
import io
import pickle
import shutil
import socket
import struct
import tarfile
from itertools import pairwise

import numpy as np
import pytest
import scipy.io
import torch
from PIL import Image
from torchvision import datasets

from pipeline.data import archives
from pipeline.data.corpora import SPLITS
from pipeline.data.image_decode import fitted, load_images, load_outside, load_shift
from pipeline.data.image_files import ARRAYS, FOLDERS
from pipeline.data.image_sets import PUBLISHED, SETS, held_out, image_source
from pipeline.data.images import (
    Images,
    ImageSet,
    channel_statistics,
    image_batch,
    open_images,
    open_set,
    spaced_images,
    write_images,
    write_set,
)
from pipeline.errors import Failure, UsageError


def load(source, root, view="rgb", size=8, valid=0.25, broken="refuse"):
    return load_images(str(source), root, view, size, valid, broken)


def fails(match, *arguments, error=Failure, call=load, **more):
    """One line that matches."""
    with pytest.raises(error, match=match) as caught:
        call(*arguments, **more)
    assert "\n" not in str(caught.value)


def plain(value, size=8, channels=3):
    """An image of one color, (H, W, C)."""
    return np.full((size, size, channels), value, dtype=np.uint8)


def picture(pixels_HWC, form="PNG"):
    file = io.BytesIO()
    Image.fromarray(pixels_HWC.squeeze()).save(file, form, quality=95)
    return file.getvalue()


def lay(folder, files):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def folders(**splits):
    """Files of a folder with two classes and, in each split, as many images of one color as are asked for."""
    return {
        f"{split}/{name}/{i}.png": picture(plain(shade + i))
        for split, count in splits.items()
        for name, shade in (("ant", 0), ("bee", 100))
        for i in range(count)
    }


def shades(images):
    """The first pixel of each image with its label, in order."""
    return list(zip(images.pixels_NCHW[:, 0, 0, 0].tolist(), images.labels_N.tolist(), strict=True))


# Sets by name


def test_digits_are_split_for_good(tmp_path):
    digits = load("digits", tmp_path, "grey", 8, 0.1)
    assert digits.classes == tuple("0123456789")
    sizes = {split: len(images.labels_N) for split, images in digits.splits.items()}
    assert list(sizes) == ["train", "valid", "test"]
    assert sum(sizes.values()) == 1797
    assert sizes["test"] == pytest.approx(0.2 * 1797, abs=5)
    assert sizes["valid"] == pytest.approx(0.08 * 1797, abs=5)
    from sklearn.datasets import load_digits

    original = load_digits()
    known = {image.tobytes(): label for image, label in zip(original.images.astype(int), original.target, strict=True)}
    seen = set()
    for images in digits.splits.values():
        assert images.pixels_NCHW.shape[1:] == (1, 8, 8)
        assert images.pixels_NCHW.max() == 255
        assert np.bincount(images.labels_N).min() > 0.8 * np.bincount(images.labels_N).max()
        for pixels, label in zip(images.pixels_NCHW, images.labels_N, strict=True):
            levels = np.round(pixels[0] / 255 * 16).astype(int).tobytes()
            assert known[levels] == label
            seen.add(levels)
    assert len(seen) == len(known)
    again = load("digits", tmp_path, "grey", 8, 0.1)
    for split in sizes:
        assert np.array_equal(digits.splits[split].pixels_NCHW, again.splits[split].pixels_NCHW)


def test_what_is_held_out_is_a_share_of_each_class():
    labels_N = np.array([0] * 40 + [1] * 8 + [2] * 2 + [3])
    held_N = held_out(labels_N, 0.25)
    assert [int(held_N[labels_N == label].sum()) for label in range(4)] == [10, 2, 1, 0]
    assert np.array_equal(held_N, held_out(labels_N, 0.25))
    # Neither the first nor the last of a class: files may be in an order that means something.
    assert 0 < np.nonzero(held_N[:40])[0].min() < 20 < np.nonzero(held_N[:40])[0].max()


COUNTS = {"train": 8, "test": 4}


def cifar(folder, split_names, key, meta, names):
    """Files of a CIFAR set: 10 images of each batch, image i of the color i, labels i modulo 2."""
    files = {}
    for name in split_names:
        data = np.stack([np.repeat([i, i + 50, i + 100], 1024) for i in range(8)]).astype(np.uint8)
        files[f"{folder}/{name}"] = pickle.dumps({"data": data, key: [i % 2 for i in range(8)]})
    files[f"{folder}/{meta[0]}"] = pickle.dumps({meta[1]: names})
    return files


def tar(files):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return file.getvalue()


def md5(content):
    return hashlib.md5(content).hexdigest()


def idx(values):
    return gzip.compress(
        struct.pack(">HBB", 0, 8, values.ndim) + struct.pack(f">{values.ndim}I", *values.shape) + values.tobytes()
    )


def made(name, monkeypatch):
    """Small archives in the format of a published set, with whose checksums those of the real ones are replaced."""
    kind, files = PUBLISHED[name].kind, {}
    if name.startswith("cifar"):
        if name == "cifar10":
            batches = [[f"data_batch_{i}" for i in range(1, 6)], ["test_batch"]]
            unpacked = cifar(
                kind.base_folder, [*batches[0], *batches[1]], "labels", ("batches.meta", "label_names"), ["cat", "dog"]
            )
        else:
            batches = [["train"], ["test"]]
            unpacked = cifar(
                kind.base_folder, [*batches[0], *batches[1]], "fine_labels", ("meta", "fine_label_names"), ["cat", "dog"]
            )
        sums = {path.split("/")[1]: md5(content) for path, content in unpacked.items()}
        for attribute, members in zip(("train_list", "test_list"), batches, strict=True):
            monkeypatch.setattr(kind, attribute, [[member, sums[member]] for member in members])
        monkeypatch.setattr(kind, "meta", kind.meta | {"md5": sums[kind.meta["filename"]]})
        files[kind.filename] = tar(unpacked)
        monkeypatch.setattr(kind, "tgz_md5", md5(files[kind.filename]))
    elif name == "stl10":
        unpacked = {"class_names.txt": b"cat\ndog\n", "fold_indices.txt": b"0 1\n" * 10, "unlabeled_X.bin": b"nothing"}
        for split, count in COUNTS.items():
            # Columns come before rows: the image's first row goes from 0 to 95.
            image = np.broadcast_to(np.arange(96, dtype=np.uint8)[:, None], (3, 96, 96))
            unpacked[f"{split}_X.bin"] = np.stack([image + np.uint8(i) for i in range(count)]).tobytes()
            unpacked[f"{split}_y.bin"] = bytes(1 + i % 2 for i in range(count))
        for attribute in ("train_list", "test_list"):
            monkeypatch.setattr(kind, attribute, [[member, md5(unpacked[member])] for member, _ in getattr(kind, attribute)])
        files[kind.filename] = tar({f"{kind.base_folder}/{member}": content for member, content in unpacked.items()})
        monkeypatch.setattr(kind, "tgz_md5", md5(files[kind.filename]))
    elif name == "svhn":
        listed = {}
        for split, count in COUNTS.items():
            file = io.BytesIO()
            x_HWCN = np.stack([plain(i, 32) for i in range(count)], -1)
            scipy.io.savemat(file, {"X": x_HWCN, "y": np.array([[10 if i % 10 == 0 else i % 10] for i in range(count)])})
            files[f"{split}_32x32.mat"] = file.getvalue()
            listed[split] = ["", f"{split}_32x32.mat", md5(file.getvalue())]
        monkeypatch.setattr(kind, "split_list", listed)
    else:
        for split, count in {"train": 20, "t10k": 10}.items():
            files[f"{split}-images-idx3-ubyte.gz"] = idx(np.stack([plain(i, 28, 1)[..., 0] for i in range(count)]))
            files[f"{split}-labels-idx1-ubyte.gz"] = idx(np.arange(count, dtype=np.uint8) % 10)
        monkeypatch.setattr(kind, "resources", [(file, md5(content)) for file, content in files.items()])
    return files


def publish(name, files, monkeypatch, url):
    sums = {url(file): hashlib.sha256(content).hexdigest() for file, content in files.items()}
    monkeypatch.setitem(PUBLISHED, name, PUBLISHED[name]._replace(files=sums))


EXPECTED = {
    "cifar10": (("cat", "dog"), {"train": 30, "valid": 10, "test": 8}),
    "cifar100": (("cat", "dog"), {"train": 6, "valid": 2, "test": 8}),
    "stl10": (("cat", "dog"), {"train": 6, "valid": 2, "test": 4}),
    "fashionmnist": (tuple(datasets.FashionMNIST.classes), {"train": 10, "valid": 10, "test": 10}),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_published_sets_are_downloaded_once(name, server, monkeypatch, tmp_path):
    server.files |= (files := made(name, monkeypatch))
    publish(name, files, monkeypatch, server.url)
    size = 96 if name == "stl10" else 8
    first = load(name, tmp_path, size=size)
    classes, counts = EXPECTED[name]
    assert first.classes == classes
    assert {split: len(images.labels_N) for split, images in first.splits.items()} == counts
    modulus = 10 if name == "fashionmnist" else 2
    for shade, label in (pair for images in first.splits.values() for pair in shades(images)):
        assert shade % modulus == label
    pixels_NCHW = first.splits["test"].pixels_NCHW
    if name.startswith("cifar"):
        assert pixels_NCHW[3, :, 0, 0].tolist() == [3, 53, 103]
    if name == "stl10":
        assert pixels_NCHW[3, 1, 5].tolist() == list(range(3, 99))
    server.files.clear()
    again = load(name, tmp_path, size=size)
    assert np.array_equal(again.splits["train"].pixels_NCHW, first.splits["train"].pixels_NCHW)


def test_svhn_has_the_digit_0_where_its_files_say_10(monkeypatch, tmp_path):
    monkeypatch.setitem(COUNTS, "train", 20)
    lay(tmp_path / "data/archives/svhn", made("svhn", monkeypatch))
    svhn = load("svhn", tmp_path, size=32)
    assert svhn.classes == tuple("0123456789")
    assert shades(svhn.splits["test"]) == [(0, 0), (1, 1), (2, 2), (3, 3)]
    assert svhn.splits["train"].pixels_NCHW.shape == (10, 3, 32, 32)


def test_archives_put_there_by_hand_need_no_network(monkeypatch, tmp_path):
    files = made("cifar100", monkeypatch)
    publish("cifar100", files, monkeypatch, "http://127.0.0.1:9/{}".format)
    lay(tmp_path / "data/archives/cifar100", files)
    assert load("cifar100", tmp_path).classes == ("cat", "dog")
    # What is unpacked is enough, and mended from the archive.
    for file in files:
        (tmp_path / "data/archives/cifar100" / file).rename(tmp_path / file)
    assert load("cifar100", tmp_path).classes == ("cat", "dog")
    (tmp_path / "data/archives/cifar100/cifar-100-python/train").write_bytes(b"cut off")
    shutil.move(tmp_path / "cifar-100-python.tar.gz", tmp_path / "data/archives/cifar100")
    assert load("cifar100", tmp_path).classes == ("cat", "dog")


def test_nothing_is_unpickled_that_is_not_the_published_file(monkeypatch, tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    monkeypatch.setattr(archives, "FIRST_WAIT", 0.0)
    publish("cifar10", {"cifar-10-python.tar.gz": b""}, monkeypatch, "http://127.0.0.1:9/{}".format)
    lay(tmp_path / "data/archives/cifar10/cifar-10-batches-py", {"data_batch_1": pickle.dumps(Evil())})
    fails("cifar10 needs", "cifar10", tmp_path)
    assert not (tmp_path / "ran").exists()


def test_without_a_network_one_line_says_what_belongs_where(monkeypatch, tmp_path):
    monkeypatch.setattr(archives, "FIRST_WAIT", 0.0)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: (_ for _ in ()).throw(socket.gaierror(-2, "Name not known")))
    folder = tmp_path / "data/archives/fashionmnist/FashionMNIST/raw"
    names = "train-images-idx3-ubyte.gz, train-labels-idx1-ubyte.gz, t10k-images-idx3-ubyte.gz, t10k-labels-idx1-ubyte.gz"
    fails(rf"^fashionmnist needs {names} in {folder}: http.*put it at {folder}/train-images", "fashionmnist", tmp_path)
    fails(r"^svhn needs train_32x32.mat, test_32x32.mat in .*\(sha256 435e94", "svhn", tmp_path)


def test_damaged_remains_of_a_set_have_a_remedy(monkeypatch, tmp_path):
    files = made("fashionmnist", monkeypatch)
    publish("fashionmnist", files, monkeypatch, "http://127.0.0.1:9/{}".format)
    raw = lay(tmp_path / "data/archives/fashionmnist/FashionMNIST/raw", files)
    load("fashionmnist", tmp_path)
    whole = (raw / "train-images-idx3-ubyte").read_bytes()
    for damage in (whole[:-100], whole[:10], b""):
        (raw / "train-images-idx3-ubyte").write_bytes(damage)
        fails("fashionmnist cannot be unpacked or read there .* remove everything but the archives", "fashionmnist", tmp_path)


def test_imagenet_is_a_folder_of_its_own(tmp_path):
    folder = tmp_path / "data/archives/imagenet"
    fails(rf"^imagenet: put train/<class>/ .*ILSVRC2012_img_train\.tar.* into {folder} \(", "imagenet", tmp_path)
    lay(folder, {f"{split}/{name}/{i}.JPEG": picture(plain(i * 9), "JPEG") for split in ("train", "val")
                 for name in ("n01440764", "n01443537") for i in range(4)})  # fmt: skip
    imagenet = load("imagenet", tmp_path)
    assert imagenet.classes == ("n01440764", "n01443537")
    assert {split: len(images.labels_N) for split, images in imagenet.splits.items()} == {"train": 6, "valid": 2, "test": 8}
    lay(folder, {"train/n01443537.tar": b""})
    fails(r"train/n01443537\.tar: left over from unpacking that was cut off; remove", "imagenet", tmp_path)


# Folders


def test_a_folder_of_png_and_jpeg(tmp_path):
    files = folders(train=4, valid=1, test=2)
    files |= {"train/ant/more/deep.jpeg": picture(plain(60, 16), "JPEG"), "train/bee/notes.txt": b"no image"}
    found = load(lay(tmp_path / "set", files), tmp_path)
    assert found.classes == ("ant", "bee")
    assert found.skipped == 0
    assert sorted(shades(found.splits["train"])) == [(0, 0), (1, 0), (2, 0), (3, 0), (60, 0), *((100 + i, 1) for i in range(4))]
    assert shades(found.splits["valid"]) == [(0, 0), (100, 1)]
    assert found.splits["test"].pixels_NCHW.shape == (4, 3, 8, 8)
    assert found.splits["test"].pixels_NCHW.dtype == np.uint8
    # A path relative to the root is the same.
    assert shades(load("set", tmp_path).splits["train"]) == shades(found.splits["train"])


def test_a_share_is_held_out_where_there_is_no_validation(tmp_path):
    lay(tmp_path, folders(train=8, test=1))
    found = load(tmp_path, tmp_path)
    train, valid = (shades(found.splits[split]) for split in ("train", "valid"))
    assert sorted(train + valid) == [*((i, 0) for i in range(8)), *((100 + i, 1) for i in range(8))]
    assert [label for _, label in valid] == [0, 0, 1, 1]
    # One split beside train is the test, whatever it is called.
    lay(tmp_path / "other", folders(train=8, val=1))
    assert shades(load("other", tmp_path).splits["test"]) == [(0, 0), (100, 1)]
    lay(tmp_path / "other", folders(test=2))
    assert shades(load("other", tmp_path).splits["valid"]) == [(0, 0), (100, 1)]
    lay(tmp_path / "other", folders(valid=2))
    fails("other: has both valid and val; keep one of them", "other", tmp_path)


def test_folders_of_classes_alone(tmp_path):
    lay(
        tmp_path / "plain",
        {f"{name}/{i}.png": picture(plain(20 * i + j)) for i in range(10) for j, name in enumerate(("ant", "bee"))},
    )
    found = load("plain", tmp_path)
    assert [sorted(found.splits[split].labels_N) for split in SPLITS] == [[0] * 6 + [1] * 6, [0, 0, 1, 1], [0, 0, 1, 1]]
    assert len({shade for split in SPLITS for shade in shades(found.splits[split])}) == 20


def test_links_that_lead_back(tmp_path):
    lay(tmp_path / "loop", folders(train=2, test=1))
    (tmp_path / "loop/train/bee/linked").symlink_to(tmp_path / "loop/train/ant")
    assert len(load("loop", tmp_path).splits["train"].labels_N) == 4
    # By way of each other; with two of them torchvision would not come to an end.
    for name, target in (("ant/x", "bee"), ("ant/y", "../test"), ("../test/ant/z", "train")):
        (tmp_path / "loop/train" / name).symlink_to(tmp_path / "loop/train" / target)
    fails(r"loop/.*/linked/x: a link that leads back to a folder it lies in; remove it", "loop", tmp_path)


def test_layouts_that_are_refused(tmp_path):
    lay(tmp_path / "plain", {"ant/0.png": picture(plain(1)), "bee/0.png": picture(plain(2))})
    fails("plain: no class has two images in train, one of them for test", "plain", tmp_path)
    lay(tmp_path / "half", folders(train=2))
    fails(f"half: has no test split; expected {FOLDERS}", "half", tmp_path)
    (tmp_path / "empty").mkdir()
    fails(f"empty: Couldn't find any class folder in .*empty; expected {FOLDERS}", "empty", tmp_path)
    lay(tmp_path / "void", folders(train=2, test=1) | {"test/bee/0.txt": b""})
    (tmp_path / "void/test/bee/0.png").unlink()
    fails("void: Found no valid file for the classes bee", "void", tmp_path)
    lay(tmp_path / "differ", folders(train=2, test=1) | {"test/cow/0.png": picture(plain(3)), "test/dog/0.png": b""})
    fails("differ: class 'cow' is in test but not in train; every split needs", "differ", tmp_path)
    lay(tmp_path / "one", {f"{split}/ant/0.png": picture(plain(1)) for split in ("train", "test")})
    fails("one: has the one class 'ant'; classification needs at least two", "one", tmp_path)
    lay(tmp_path / "few", folders(train=1, test=1))
    fails("few: no class has two images in train", "few", tmp_path)
    (tmp_path / "file.txt").write_text("text")
    fails("data has 'file.txt': expected a folder with", "file.txt", tmp_path, error=UsageError)
    names = ", ".join(SETS)
    fails(rf"data has 'cifar': neither images by name \({names}\) nor", "cifar", tmp_path, error=UsageError)
    fails("data has 'x+': neither", "x" * 5000, tmp_path, error=UsageError)
    assert image_source("cifar10", tmp_path) == tmp_path / "data/archives/cifar10"
    assert image_source("mine", tmp_path) == tmp_path / "mine"


def deep():
    file = io.BytesIO()
    Image.fromarray(np.full((8, 8), 5000, np.uint16)).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "cannot be decoded"),
        (b"no image at all", "cannot be decoded"),
        (picture(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))[:900], "cannot be decoded"),
        (picture(plain(3, 64), "JPEG")[:400], "cannot be decoded"),
        (deep(), r"its pixels have more than 8 bits \(Pillow's mode I;16"),
    ],
    ids=["empty", "text", "half a PNG", "half a JPEG", "16 bits"],
)
def test_broken_images_are_refused_or_counted(tmp_path, content, reason):
    lay(tmp_path, folders(train=4, test=2) | {"train/ant/9.png": content, "test/ant/9.png": content})
    fails(rf"(train|test)/ant/9\.png: {reason}.*; replace or remove it, or set prepare.broken: skip", tmp_path, tmp_path)
    found = load(tmp_path, tmp_path, broken="skip")
    assert found.skipped == 2
    assert shades(found.splits["test"]) == [(0, 0), (1, 0), (100, 1), (101, 1)]
    assert sum(len(images.labels_N) for images in found.splits.values()) == 12
    lay(tmp_path, {"test/bee/0.png": content, "test/bee/1.png": content})
    fails(r"class 'bee': all images of a split are broken, such as .*test/bee/0\.png", tmp_path, tmp_path, broken="skip")


# .npz


def arrays(path, shape=(8, 8, 3), **more):
    content = {
        "x_train": np.stack([np.full(shape, i, np.uint8) for i in range(12)]),
        "y_train": np.arange(12) % 3,
        "x_test": np.stack([np.full(shape, i, np.uint8) for i in range(3)]),
        "y_test": np.arange(3),
    } | more
    np.savez(path, **{name: value for name, value in content.items() if value is not None})
    return path


@pytest.mark.parametrize("shape", [(8, 8), (8, 8, 3), (3, 8, 8), (8, 8, 1), (1, 8, 8)])
def test_arrays_in_any_order_of_axes(tmp_path, shape):
    gradient = np.broadcast_to(np.arange(8, dtype=np.uint8)[:, None], (8, 8))
    x = gradient if len(shape) == 2 else np.broadcast_to(gradient[None] if shape[2] == 8 else gradient[..., None], shape)
    more = {"x_test": np.stack([x] * 3), "y_test": np.array([[2], [0], [1]], dtype=np.uint8)}
    path = arrays(tmp_path / "a.npz", shape, **more)
    for view, channels in (("rgb", 3), ("grey", 1)):
        found = load(path, tmp_path, view)
        assert found.classes == ("0", "1", "2")
        assert found.splits["test"].labels_N.tolist() == [2, 0, 1]
        assert np.array_equal(found.splits["test"].pixels_NCHW, np.broadcast_to(gradient, (3, channels, 8, 8)))
        assert sorted(shades(found.splits["train"]) + shades(found.splits["valid"])) == [(i, i % 3) for i in range(12)]


def test_arrays_with_names_and_validation(tmp_path):
    more = {"x_val": plain(7)[None], "y_val": np.array([1]), "classes": np.array(["ant", "bee", "cow"])}
    found = load(arrays(tmp_path / "a.npz", **more), tmp_path)
    assert found.classes == ("ant", "bee", "cow")
    assert shades(found.splits["valid"]) == [(7, 1)]
    assert len(found.splits["train"].labels_N) == 12


@pytest.mark.parametrize(
    ("more", "match"),
    [
        ({"x_train": None, "x_test": None}, f"expected {ARRAYS}; there are y_test, y_train"),
        ({"y_test": None}, "has no y_test; expected"),
        ({"x_test": None}, "has no test split; expected"),
        ({"y_test": np.array([0, 1, 3])}, r"image 2 of x_test: label 3 in test is none of the 3 classes"),
        ({"y_train": np.arange(12) - 1}, r"image 0 of x_train: label -1 in train is none of the 11 classes"),
        ({"y_train": np.arange(12) % 3 * 2, "y_test": np.zeros(3, int)}, "class '1' has no image in train; add some"),
        ({"y_test": np.zeros(3)}, r"y_test is float64 of shape \(3,\), expected 3 whole numbers"),
        ({"y_test": np.zeros(4, int)}, r"y_test is int64 of shape \(4,\), expected 3 whole numbers"),
        ({"x_test": np.zeros((3, 8, 8, 3))}, r"x_test is float64 of shape \(3, 8, 8, 3\), expected uint8 \(N, H, W\)"),
        ({"x_test": np.zeros((3, 8, 8, 4), np.uint8)}, r"x_test is uint8 of shape \(3, 8, 8, 4\), expected"),
        ({"x_test": np.zeros((3, 0, 8, 3), np.uint8)}, r"x_test is uint8 of shape \(3, 0, 8, 3\), expected"),
        ({"x_test": np.zeros((0, 8, 8, 3), np.uint8), "y_test": np.zeros(0, int)}, "the test split is empty"),
        ({"x_test": np.zeros((3, 9, 9, 3), np.uint8)}, r"different sizes \(channels x height x width: train 3x8x8, test 3x9x9\)"),
        ({"x_test": np.array([plain(1), plain(1, 9), 0], dtype=object)}, "x_test holds Python objects, as images of different"),
        ({"classes": np.array(["a", "a", "b"])}, "classes names one twice, or is no plain list"),
        ({"classes": np.array(["a", "b"])}, "image 2 of x_train: label 2 in train is none of the 2 classes"),
    ],
)
def test_arrays_that_are_refused(tmp_path, more, match):
    fails(rf"a\.npz[:,].*{match}", arrays(tmp_path / "a.npz", **more), tmp_path)


def test_damaged_npz(tmp_path):
    path = arrays(tmp_path / "a.npz")
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"something else", whole[:40] + bytes(40) + whole[80:], pickle.dumps([1])):
        path.write_bytes(content)
        fails(r"a\.npz: truncated or damaged \(.*; fetch it again", path, tmp_path)
    with path.open("wb") as file:
        np.save(file, np.zeros(3))
    fails(r"a\.npz: is one array, no \.npz", path, tmp_path)


KINDS = [0, 1, 0, 1, 0, 1, 1, 0]


def jpegs(path, **more):
    files = [picture(plain(20 * i, 8 + i), "JPEG") for i in range(8)]
    content = {
        "blob": np.frombuffer(b"".join(files), np.uint8),
        "offset": np.cumsum([0, *map(len, files)]),
        "y": np.array(KINDS, dtype=np.uint8),
        "is_test": np.arange(8) >= 6,
        "classes": np.array(["ant", "bee"]),
    } | more
    np.savez(path, **{name: value for name, value in content.items() if value is not None})
    return path


def test_jpeg_bytes(tmp_path):
    found = load(jpegs(tmp_path / "j.npz"), tmp_path)
    assert found.classes == ("ant", "bee")
    assert shades(found.splits["test"]) == [(120, 1), (140, 0)]
    assert sorted(shades(found.splits["train"]) + shades(found.splits["valid"])) == [(20 * i, KINDS[i]) for i in range(6)]
    blob = np.load(tmp_path / "j.npz")["blob"].copy()
    blob[:100] = 0
    fails(r"j\.npz, image 0: cannot be decoded", jpegs(tmp_path / "j.npz", blob=blob), tmp_path)
    assert load(tmp_path / "j.npz", tmp_path, broken="skip").skipped == 1
    found = load(jpegs(tmp_path / "k.npz", is_test=None), tmp_path)
    assert [len(found.splits[split].labels_N) for split in SPLITS] == [4, 2, 2]


@pytest.mark.parametrize(
    ("more", "match"),
    [
        ({"offset": np.arange(9)[::-1]}, r"offset does not cut blob \(uint8\) into 8 images"),
        ({"offset": np.arange(9) * 10**6}, "offset does not cut blob"),
        ({"offset": np.arange(9) - 1}, "offset does not cut blob"),
        ({"offset": np.arange(8)}, r"y is uint8 of shape \(8,\), expected 7 whole numbers"),
        ({"y": None}, "has no y; expected"),
        ({"is_test": np.zeros(8, bool)}, "has no test split"),
        ({"is_test": np.zeros(7, bool)}, r"is_test has shape \(7,\), expected one value for each of 8"),
        ({"y": np.arange(8)}, r"image 2: label 2 in train is none of the 2 classes"),
    ],
)
def test_jpeg_bytes_that_are_refused(tmp_path, more, match):
    fails(rf"j\.npz[:,].*{match}", jpegs(tmp_path / "j.npz", **more), tmp_path)


def test_real_images(shared_data, tmp_path):
    if not (shared_data / "cifar10_jpeg.npz").exists():
        pytest.skip("cifar10_jpeg.npz is not there")
    with np.load(shared_data / "cifar10_jpeg.npz") as file:
        rows = np.arange(0, len(file["y"]), 100)
        blob, offset = file["blob"], file["offset"]
        files = [blob[offset[row] : offset[row + 1]] for row in rows]
        some = {name: file[name][rows] for name in ("y", "is_test")} | {"classes": file["classes"]}
    np.savez(tmp_path / "some.npz", blob=np.concatenate(files), offset=np.cumsum([0, *map(len, files)]), **some)
    found = load("some.npz", tmp_path, size=32, valid=0.1)
    assert found.classes[:3] == ("airplane", "automobile", "bird")
    assert sum(len(images.labels_N) for images in found.splits.values()) == 600
    assert len(found.splits["test"].labels_N) == some["is_test"].sum()
    mean_C, deviation_C = channel_statistics(found.splits["train"])
    # Of the published set: 0.491, 0.482, 0.447 and 0.247, 0.243, 0.262.
    assert np.allclose(mean_C, [0.491, 0.482, 0.447], atol=0.03)
    assert np.allclose(deviation_C, [0.247, 0.243, 0.262], atol=0.03)


# Shifts


def test_a_shift_has_some_of_the_classes(tmp_path):
    lay(tmp_path / "shift", {"bee/0.png": picture(plain(5)), "ant/0.png": picture(plain(6)), "README.md": b"about it"})
    shift, _ = load_shift("shift", tmp_path, "rgb", 8, ("cow", "bee", "ant"), "refuse")
    assert shades(shift) == [(6, 2), (5, 1)]
    fails(
        r"shift: class 'bee' is none of the 2 classes that are trained \(cow and others\); rename",
        "shift", tmp_path, "rgb", 8, ("cow", "ant"), "refuse", call=load_shift,
    )  # fmt: skip
    lay(tmp_path / "split", folders(train=3, test=1))
    assert shades(load_shift("split", tmp_path, "rgb", 8, ("bee", "ant"), "refuse")[0]) == [(0, 1), (100, 0)]
    jpegs(tmp_path / "j.npz", is_test=None)
    assert shades(load_shift("j.npz", tmp_path, "rgb", 8, ("bee", "ant"), "refuse")[0]) == [
        (20 * i, 1 - KINDS[i]) for i in range(8)
    ]
    lay(tmp_path / "shift", {"bee/0.png": b"broken", "bee/1.png": picture(plain(7))})
    shift, skipped = load_shift("shift", tmp_path, "rgb", 8, ("ant", "bee"), "skip")
    assert (shades(shift), skipped) == ([(6, 0), (7, 1)], 1)


def test_what_is_outside_has_none_of_the_classes(tmp_path):
    lay(tmp_path / "odd", {"bee/0.png": picture(plain(5)), "ant/0.png": picture(plain(6))})
    outside, _ = load_outside("odd", tmp_path, "rgb", 8, ("cow", "dog"), "refuse")
    assert shades(outside) == [(6, 0), (5, 1)]
    fails(
        r"odd: class 'bee' is trained, and data\.outside is for others; remove it there",
        "odd", tmp_path, "rgb", 8, ("cow", "bee"), "refuse", call=load_outside,
    )  # fmt: skip


# Sizes and views


def test_an_image_is_resized_by_its_shorter_side_and_cut_in_the_middle():
    image_CHW = torch.arange(16).repeat_interleave(4).expand(3, 16, 64).to(torch.uint8)
    found_CHW = fitted(image_CHW, "rgb", 4)
    # Of 4 x 16 pixels, each of which is the mean of a square of 4 x 4, the middle four columns.
    assert found_CHW.shape == (3, 4, 4)
    assert (found_CHW[0, 0].float() - torch.tensor([6, 7, 8, 9])).abs().max() <= 1
    assert torch.equal(fitted(image_CHW.transpose(1, 2), "rgb", 4), found_CHW.transpose(1, 2))
    # Antialiased: stripes become grey, though those between which a pixel would be interpolated are black.
    stripes_CHW = torch.tensor([200, 0, 0, 200] * 8).expand(1, 32, 32).to(torch.uint8)
    assert (fitted(stripes_CHW, "grey", 8).float() - 100).abs().max() < 20
    assert fitted(torch.full((1, 2, 3), 9, dtype=torch.uint8), "rgb", 32).unique().tolist() == [9]
    exact_CHW = torch.randint(0, 256, (3, 8, 8), dtype=torch.uint8)
    assert torch.equal(fitted(exact_CHW, "rgb", 8), exact_CHW)


def test_grey_and_luminance():
    values_1HW = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16)
    assert torch.equal(fitted(values_1HW, "rgb", 16), values_1HW.expand(3, 16, 16))
    assert torch.equal(fitted(values_1HW.expand(3, 16, 16), "grey", 16), values_1HW)
    colors_CHW = torch.randint(0, 256, (3, 16, 16), dtype=torch.uint8)
    red, green, blue = colors_CHW.double()
    expected_HW = 0.299 * red + 0.587 * green + 0.114 * blue
    assert (fitted(colors_CHW, "grey", 16)[0] - expected_HW).abs().max() < 0.6


def test_views_of_files(tmp_path):
    files = folders(train=3, test=1)
    files["test/ant/0.png"] = picture(plain(77, channels=1))
    files["test/bee/0.png"] = picture(np.broadcast_to(np.array([200, 0, 0], np.uint8), (8, 8, 3)))
    lay(tmp_path, files)
    rgb, grey = (load(tmp_path, tmp_path, view).splits["test"].pixels_NCHW for view in ("rgb", "grey"))
    assert rgb[:, :, 0, 0].tolist() == [[77, 77, 77], [200, 0, 0]]
    assert grey[:, :, 0, 0].tolist() == [[77], [60]]


# Files


def some(count=10, channels=3, size=6):
    pixels_NCHW = np.random.default_rng(0).integers(0, 256, (count, channels, size, size), dtype=np.uint8)
    return Images(pixels_NCHW, np.arange(count) % 3)


def test_images_are_mapped_not_loaded(tmp_path):
    images = load("digits", tmp_path, "grey", 8, 0.1).splits["test"]
    write_images(tmp_path / "test", images)
    opened = open_images(tmp_path / "test", 10)
    assert isinstance(opened.pixels_NCHW, np.memmap)
    assert np.array_equal(opened.pixels_NCHW, images.pixels_NCHW)
    assert np.array_equal(opened.labels_N, images.labels_N)
    assert opened.labels_N.dtype == np.int64
    batch_BCHW, labels_B = image_batch(opened, 4, 0, 1, 1, True)
    expected_BCHW, expected_B = image_batch(images, 4, 0, 1, 1, True)
    assert torch.equal(batch_BCHW, expected_BCHW)
    assert torch.equal(labels_B, expected_B)


@pytest.mark.parametrize("name", ["pixels.npy", "labels.npy"])
@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-5]),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"something else"),
        lambda path: np.save(path, np.zeros((2, 2))),
        lambda path: np.save(path, np.zeros((9, 3, 6, 6), dtype=np.uint8)),
        lambda path: np.save(path, np.zeros((10, 2, 6, 6), dtype=np.uint8)),
        lambda path: np.save(path, np.zeros((10, 3, 6, 6))),
        lambda path: np.save(path, np.zeros(9, dtype=np.int64)),
        lambda path: np.save(path, np.array([None] * 10), allow_pickle=True),
        lambda path: path.unlink(),
    ],
)
def test_damaged_files(tmp_path, name, damage):
    write_images(tmp_path, some())
    damage(tmp_path / name)
    fails(r"(pixels|labels)\.npy: .*run `vqmoe prepare`", tmp_path, 3, call=open_images)


def test_labels_are_checked_against_the_classes(tmp_path):
    write_images(tmp_path, some())
    assert len(open_images(tmp_path, 3).labels_N) == 10
    fails("labels.npy: holds labels 0 to 2 of 2 classes; run `vqmoe prepare` again", tmp_path, 2, call=open_images)


def test_a_set_round_trips(tmp_path):
    given = ImageSet(("caf\u00e9", "b", "c"), {split: some() for split in SPLITS})
    write_set(tmp_path, given)
    found = open_set(tmp_path)
    assert found.classes == given.classes
    for split in SPLITS:
        for name in Images._fields:
            assert (getattr(found.splits[split], name) == getattr(given.splits[split], name)).all()
    for content in ("{}", "[1]", "["):
        (tmp_path / "classes.json").write_text(content)
        fails("classes.json: .*run `vqmoe prepare` again", tmp_path, call=open_set)


# Batches


def test_a_batch_depends_on_seed_and_step_only():
    images, state = some(), torch.random.get_rng_state()
    one_BCHW, labels_B = image_batch(images, 4, 0, 3, 2, True)
    again_BCHW, again_B = image_batch(images, 4, 0, 3, 2, True)
    assert torch.equal(one_BCHW, again_BCHW)
    assert torch.equal(labels_B, again_B)
    for seed, step in ((0, 4), (1, 3)):
        assert not torch.equal(one_BCHW, image_batch(images, 4, seed, step, 2, True)[0])
    # Also where there is one image, which can only be cropped differently.
    assert not torch.equal(*(image_batch(some(1), 8, seed, 1, 2, True)[0] for seed in (0, 1)))
    assert torch.equal(state, torch.random.get_rng_state())
    assert one_BCHW.shape == (4, 3, 6, 6)
    assert one_BCHW.dtype == torch.float32
    assert labels_B.dtype == torch.int64


def test_batches_go_through_the_images_in_shuffled_epochs():
    images = Images(some(10).pixels_NCHW, np.arange(10))
    seen = [int(label) for step in range(1, 7) for label in image_batch(images, 5, 0, step, 0, False)[1]]
    epochs = [seen[:10], seen[10:20], seen[20:]]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert all(one != other for one, other in pairwise(epochs))
    # A batch larger than the set goes on into the next epochs.
    assert [int(label) for label in image_batch(images, 20, 0, 1, 0, False)[1]] == seen[:20]
    batch_BCHW, labels_B = image_batch(images, 5, 0, 2, 0, False)
    assert np.array_equal((batch_BCHW.double() * 255).round().numpy(), images.pixels_NCHW[labels_B])
    assert batch_BCHW.max() <= 1


@pytest.mark.parametrize(("pad", "flip"), [(0, True), (1, False), (2, True)])
def test_every_crop_is_one_of_the_padded_image(pad, flip):
    images = some(6, 3, 4)
    padded_NCHW = np.pad(images.pixels_NCHW, [(0, 0), (0, 0), (pad, pad), (pad, pad)])
    images = Images(images.pixels_NCHW, np.arange(6))
    possible = {
        (row, crop[..., ::mirror].tobytes()): (top, left, mirror)
        for row in range(6)
        for top in range(2 * pad + 1)
        for left in range(2 * pad + 1)
        for crop in [np.ascontiguousarray(padded_NCHW[row, :, top : top + 4, left : left + 4])]
        for mirror in ((1, -1) if flip else (1,))
    }
    found = []
    for step in range(1, 51):
        batch_BCHW, labels_B = image_batch(images, 6, 0, step, pad, flip)
        pixels = (batch_BCHW * 255).round().to(torch.uint8).numpy()
        found += [possible[int(label), image.tobytes()] for label, image in zip(labels_B, pixels, strict=True)]
    tops, lefts, mirrors = (list(values) for values in zip(*found, strict=True))
    assert {*tops} == {*lefts} == set(range(2 * pad + 1))
    assert {*found} == {(t, le, m) for t in {*tops} for le in {*lefts} for m in {*mirrors}}
    assert len({*mirrors}) == 1 + flip
    if flip:
        # Independent of each other and about half: 300 draws, four deviations.
        assert abs(mirrors.count(-1) - 150) < 4 * 300**0.5 / 2
    # Each image of a batch has its own draw.
    assert pad == 0 or len({*found[:6]}) > 1


# Statistics


def test_spaced_images_reach_both_ends_without_repeats():
    images = some()
    few = spaced_images(images, 4)
    assert np.array_equal(few.pixels_NCHW, images.pixels_NCHW[[0, 3, 6, 9]])
    assert few.labels_N.tolist() == images.labels_N[[0, 3, 6, 9]].tolist()
    assert len(spaced_images(images, 50).labels_N) == 10


def test_channel_statistics(monkeypatch):
    images = some(11)
    whole = channel_statistics(images)
    values = images.pixels_NCHW.astype(np.float64) / 255
    for found_C, expected_C in zip(whole, (values.mean((0, 2, 3)), values.std((0, 2, 3))), strict=True):
        assert found_C.dtype == np.float32
        assert np.allclose(found_C, expected_C, rtol=1e-6)
    # A stretch at a time, the last one shorter, is the same.
    monkeypatch.setattr("pipeline.data.images._CHUNK", 4 * 3 * 36)
    for found_C, expected_C in zip(channel_statistics(images), whole, strict=True):
        assert np.array_equal(found_C, expected_C)
    images.pixels_NCHW[:, 1] = 51
    mean_C, deviation_C = channel_statistics(images)
    assert mean_C[1] == pytest.approx(0.2)
    assert deviation_C[1] == 1


def test_a_full_disk_is_one_line(monkeypatch, tmp_path):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    fails(r"no room for \d+ images \(No space left on device\); free space there, or name a folder", "digits", tmp_path)


def test_a_part_of_a_batch_is_these_rows_of_it():
    images = some(9)
    pixels_BCHW, labels_B = image_batch(images, 6, 0, 2, 2, True)
    for part in (slice(0, 2), slice(2, 6)):
        part_BCHW, part_B = image_batch(images, 6, 0, 2, 2, True, part)
        assert torch.equal(part_BCHW, pixels_BCHW[part]) and torch.equal(part_B, labels_B[part])
