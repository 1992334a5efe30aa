import numpy as np
import pytest
from PIL import Image

from pipeline.checking import check
from pipeline.checking.images import _patch
from tests.checking.conftest import lay


def warned(found, words):
    return any(words in warning for warning in found.warnings)


def test_sizes_modes_and_a_size_that_fits(root):
    found = check(lay(root, "images"), root)
    assert found.facts["sizes"]["width"] == {"min": 28, "median": 28, "95 %": 28, "max": 28}
    assert found.facts["sizes"]["height"]["max"] == 30 and found.facts["modes"] == {"L": 60}
    assert found.params["data"]["view"] == "grey" and found.preset == "vision/digits"
    assert found.params["prepare"] == {"size": 28, "valid": 0.15, "broken": "refuse"} and found.params["model"] == {"patch": 4}
    assert warned(found, "test has 12 images, which tell an accuracy to within 28 points")


@pytest.mark.parametrize(("size", "patch"), [(8, 2), (12, 2), (16, 2), (28, 4), (32, 4), (40, 5), (48, 6), (60, 6), (64, 8)])
def test_patches_divide_the_image_and_are_neither_few_nor_single_pixels(size, patch):
    assert _patch(size) == patch


def test_what_repeats_is_found_after_it_is_brought_to_one_size(root):
    path = lay(root, "split images")
    (path / "test/c0/copy.bmp").write_bytes(b"")
    Image.open(path / "train/c0/2.png").save(path / "test/c0/copy.bmp")  # another file, the same pixels
    (path / "train/c1/copy.png").write_bytes((path / "train/c0/4.png").read_bytes())
    found = check(path, root)
    assert found.facts["duplicates"]["test in train"] + found.facts["duplicates"]["test in valid"] == 1
    assert warned(found, "images under several labels: 1")


def test_repeated_images_are_named_and_whether_they_were_changed(root):
    path = lay(root, "split images")
    for label in "01":
        (path / f"valid/c{label}").mkdir(parents=True)
        (path / f"train/c{label}/{int(label) + 32}.png").rename(path / f"valid/c{label}/a.png")
    grey = Image.open(path / "train/c0/2.png").convert("L")
    grey.save(path / "train/c0/2.png")
    grey.convert("RGB").save(path / "test/c0/copy1.png")
    Image.open(path / "train/c0/4.png").save(path / "test/c0/copy2.bmp")
    where = "test/c0/copy1.png (train: train/c0/2.png), test/c0/copy2.bmp (train: train/c0/4.png)"
    found = check(path, root)
    assert warned(found, "2 images of test (14.3 %) are in train too (1 of them only once they have one size and colour): ")
    assert warned(found, f"such as {where}")


def test_a_class_that_a_split_lacks_is_named(root):
    draws = np.random.default_rng(0)
    x = {f"x_{split}": draws.integers(0, 256, (n, 16, 16), np.uint8) for split, n in (("train", 30), ("valid", 9), ("test", 20))}
    y = {"y_train": np.arange(30) % 3, "y_valid": np.arange(9) % 3, "y_test": np.arange(20) % 2}
    np.savez(root / "data/a.npz", **x, **y)
    found = check(root / "data/a.npz", root)
    assert warned(
        found, "1 class of train is not in test ('2'), so no score is about it; put images of it there, by x_train, x_valid"
    )
    assert not warned(found, "not in valid")


def test_large_long_and_transparent_images(root):
    for i in range(20):
        place = root / f"data/mine/c{i % 2}"
        place.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 256, (90, 160, 4), np.uint8)
        Image.fromarray(pixels, "RGBA").save(place / f"{i}.png")
    found = check(root / "data/mine", root)
    assert found.params["prepare"]["size"] == 64 and found.params["data"]["view"] == "rgb"
    assert found.preset == "vision/cifar10" and "90" in found.notes["prepare.size"]
    assert warned(found, "100.0 % of the images are 1.5 times as long one way as the other")
    assert warned(found, "20 images are transparent in places")


def test_what_cannot_be_read_is_left_out_and_named(root):
    path = lay(root, "split images")
    (path / "train/c0/2.png").write_bytes((path / "train/c0/2.png").read_bytes()[:200])
    (path / "train/c0/4.png").write_bytes(b"")
    found = check(path, root)
    assert {name.rsplit("/", 1)[1] for name in found.facts["unreadable"]} == {"2.png", "4.png"}
    assert found.params["prepare"]["broken"] == "skip" and warned(found, "2 unreadable images are left out")
    assert sum(split["images"] for split in found.facts["splits"].values()) == 58
    for file in (path / "test/c1").iterdir():
        file.write_bytes(b"")
    assert "class 'c1': all images of a split are broken" in check(path, root).problem


def test_one_class_is_a_problem(root):
    path = lay(root, "images")
    (path / "c1").rename(root / "elsewhere")
    assert "has the one class 'c0'; classification needs at least two" in check(path, root).problem
