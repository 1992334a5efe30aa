import colorsys
import io
from typing import get_args

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage
from sklearn.datasets import load_digits

from pipeline import config
from pipeline.data.corruption import rng_for
from pipeline.data.image_noise import KINDS, LEVELS, corrupt_images
from pipeline.errors import Failure, UsageError

# torchvision means to move its JPEG to another package.

DIGITS = np.round(load_digits().images[:200] * 255 / 16).astype(np.uint8)[:, None]


def natural(count, channels, size):
    """Random images like photographs: amplitude falls as frequency rises, and channels have most in common."""
    rng = np.random.default_rng(0)
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.fftfreq(size))
    frequency[0, 0] = 1
    noise = rng.standard_normal((count, 1, size, size)) + 0.3 * rng.standard_normal((count, channels, size, size))
    image = np.fft.ifft2(np.fft.fft2(noise) / frequency).real
    return (128 + 50 * image / image.std()).clip(0, 255).astype(np.uint8)


IMAGES = {"digits": DIGITS, "grey": natural(60, 1, 32), "rgb": natural(60, 3, 32), "wide": natural(60, 3, 40)[:, :, :24]}


def one(kind, image_CHW, level, rng=None):
    """One corruption of an image of float64, at any level, and the draws it may have used."""
    return KINDS[kind](torch.as_tensor(image_CHW), level, rng or np.random.default_rng(0)).numpy()


def test_params_know_the_same_kinds():
    assert set(get_args(config.ImageCorruption)) == set(KINDS)


@pytest.mark.parametrize("images", IMAGES)
@pytest.mark.parametrize("kind", KINDS)
def test_distance_to_the_clean_images_rises_with_severity(kind, images):
    clean = IMAGES[images]
    kept, distances = clean.copy(), []
    for severity in range(1, 6):
        noisy = corrupt_images(clean, kind, severity, seed=0)
        assert noisy.dtype == torch.uint8 and noisy.shape == clean.shape
        distances.append(((noisy.numpy().astype(float) - clean) ** 2).mean())
    assert (np.diff(distances) > 0).all()
    # The mildest leaves most of an image, the strongest is more than rounding.
    assert 0 < distances[0] < clean.var() / 4 and distances[4] > 20
    assert (clean == kept).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("channels", [1, 3])
def test_images_may_be_of_any_size(kind, channels):
    for size in (8, 224):
        clean = natural(2, channels, size)
        noisy = corrupt_images(clean, kind, 5, seed=0)
        assert noisy.shape == clean.shape and (noisy.numpy() != clean).any()


@pytest.mark.parametrize("kind", KINDS)
def test_seed_severity_and_index_decide_an_image(kind):
    clean = IMAGES["rgb"][:6]
    noisy = corrupt_images(clean, kind, 3, seed=1)
    assert torch.equal(corrupt_images(torch.from_numpy(clean[4:]), kind, 3, seed=1, index_N=torch.tensor([4, 5])), noisy[4:])
    assert torch.equal(corrupt_images(clean[[5, 0]], kind, 3, seed=1, index_N=[5, 0]), noisy[[5, 0]])
    if kind in ("gaussian_noise", "shot_noise", "impulse_noise", "motion_blur", "pixelate"):
        assert not torch.equal(corrupt_images(clean, kind, 3, seed=2), noisy)
        same = corrupt_images(clean[[0, 0]], kind, 3, seed=1)
        assert not torch.equal(same[0], same[1])


@pytest.mark.parametrize("kind", KINDS)
def test_black_and_white_stay_in_range(kind):
    """Nothing wraps around in uint8, and a black pixel has no hue to divide by."""
    for value in (0, 255):
        noisy = corrupt_images(np.full((1, 3, 16, 16), value, np.uint8), kind, 5, seed=0).float()
        assert abs(noisy.mean() - value) < 90


def test_gaussian_noise():
    change = one("gaussian_noise", np.full((3, 200, 200), 0.5), 0.1) - 0.5
    assert change.std() == pytest.approx(0.1, rel=0.02) and abs(change.mean()) < 0.001
    assert abs(np.corrcoef(change.reshape(3, -1))[0, 1]) < 0.02


def test_shot_noise_is_that_of_counted_photons():
    for value in (0.1, 0.8):
        noisy = one("shot_noise", np.full((1, 300, 300), value), 50)
        assert noisy.mean() == pytest.approx(value, rel=0.01) and noisy.var() == pytest.approx(value / 50, rel=0.05)
        assert np.allclose(noisy * 50, np.round(noisy * 50))


def test_impulse_noise_is_salt_and_pepper_in_equal_parts():
    noisy = one("impulse_noise", np.full((3, 200, 200), 0.5), 0.07)
    assert (noisy == 0).mean() == pytest.approx(0.035, rel=0.1) and (noisy == 1).mean() == pytest.approx(0.035, rel=0.1)
    assert set(np.unique(noisy)) == {0, 0.5, 1}
    # A channel is hit alone.
    assert ((noisy != 0.5).sum(0) == 1).mean() > 0.15


@pytest.mark.parametrize(("size", "scale"), [(8, 1), (32, 1), (48, 1.5)])
@pytest.mark.parametrize("level", LEVELS[KINDS["gaussian_blur"]])
def test_gaussian_blur(size, scale, level):
    # The shorter side counts.
    image = natural(1, 3, size + 8)[0, :, :, :size] / 255
    expected = ndimage.gaussian_filter(image, (0, level * scale, level * scale), mode="mirror", truncate=8)
    assert np.allclose(one("gaussian_blur", image, level), expected, atol=1e-3)


@pytest.mark.parametrize(("size", "scale"), [(8, 1), (32, 1), (48, 1.5)])
def test_motion_blur(size, scale):
    """The mean of images moved along a line by whole pixels, with the weights of half a normal density."""
    image, angle = natural(1, 3, size)[0] / 255, np.random.default_rng(0).uniform(-np.pi / 4, np.pi / 4)
    expected, total = np.zeros_like(image), 0
    for way in range(int(np.ceil(4 * 2.5 * scale))):
        weight = np.exp(-0.5 * (way / (2.5 * scale)) ** 2)
        shift = (0, -way * np.sin(angle), -way * np.cos(angle))
        expected += weight * ndimage.shift(image, shift, order=1, mode="nearest")
        total += weight
    assert np.allclose(one("motion_blur", image.astype(np.float32), 2.5), expected / total, atol=1e-4)


def test_motion_goes_in_all_directions_within_45_degrees():
    point = np.zeros((1, 33, 33), np.float32)
    point[0, 16, 16] = 1
    rises = []
    for index in range(200):
        blurred = one("motion_blur", point, 2.5, rng_for(0, "motion_blur", 5, index))[0]
        row, column = (np.average(np.arange(33) - 16, weights=blurred.sum(axis)) for axis in (1, 0))
        assert column < 0
        rises.append(np.degrees(np.arctan(row / -column)))
    assert -46 < min(rises) < -42 and 42 < max(rises) < 46 and abs(np.mean(rises)) < 8


def test_brightness_is_the_value_of_hsv():
    image = natural(1, 3, 16)[0] / 255
    image[:, 0, :2] = np.array([[0, 1], [0, 0.2], [0, 0]])
    expected = np.empty_like(image)
    for row, column in np.ndindex(16, 16):
        hue, saturation, value = colorsys.rgb_to_hsv(*image[:, row, column])
        expected[:, row, column] = colorsys.hsv_to_rgb(hue, saturation, min(value + 0.2, 1))
    assert np.allclose(one("brightness", image, 0.2), expected)
    assert np.allclose(one("brightness", image[:1], 0.2), np.minimum(image[:1] + 0.2, 1))


def test_contrast_is_about_the_mean_of_each_channel():
    image = natural(1, 3, 16)[0] / 255
    expected = [channel.mean() + 0.3 * (channel - channel.mean()) for channel in image]
    assert np.allclose(one("contrast", image, 0.3), expected)
    pixels = corrupt_images(natural(1, 3, 16), "contrast", 4, seed=0)[0].numpy()
    assert np.abs(pixels - 255 * np.array(expected)).max() < 0.51


@pytest.mark.parametrize(("size", "level", "side"), [(32, 0.65, 1 / 0.65), (8, 0.5, 2), (64, 0.5, 3)])
def test_pixelate(size, level, side):
    image, draw = natural(1, 3, size)[0] / 255, np.random.default_rng(0)
    starts = [draw.random(), draw.random()]
    block = [[int(np.floor(place / side + start)) for place in range(size)] for start in starts]
    expected = np.empty_like(image)
    for row, column in np.ndindex(size, size):
        rows = [place for place in range(size) if block[0][place] == block[0][row]]
        columns = [place for place in range(size) if block[1][place] == block[1][column]]
        expected[:, row, column] = image[:, rows][:, :, columns].mean((1, 2))
    assert np.allclose(one("pixelate", image.astype(np.float32), level), expected, atol=1e-6)


def test_as_many_neighbours_share_a_block_as_the_level_says():
    columns = np.tile(np.arange(8.0, dtype=np.float32), (1, 8, 1))
    joined = [np.diff(one("pixelate", columns, 0.75, rng_for(0, "pixelate", 4, index))[0, 0]) == 0 for index in range(1000)]
    assert np.mean(joined, axis=0) == pytest.approx(np.full(7, 0.25), abs=0.05)


@pytest.mark.parametrize("channels", [1, 3])
def test_jpeg_is_that_of_another_library(channels):
    image = natural(1, channels, 32)[0]
    file = io.BytesIO()
    Image.fromarray(image.transpose(1, 2, 0).squeeze()).save(file, "JPEG", quality=40)
    expected = np.array(Image.open(file)).reshape(32, 32, channels).transpose(2, 0, 1).astype(float)
    assert np.abs(corrupt_images(image[None], "jpeg", 5, seed=0)[0].numpy() - expected).mean() < 1


def test_wrong_use_is_one_clear_line():
    with pytest.raises(UsageError, match="'fog' does not exist; there are: gaussian_noise, shot_noise,"):
        corrupt_images(DIGITS, "fog", 1, 0)
    for severity in (0, 6):
        with pytest.raises(UsageError, match=f"severity {severity} of corruption jpeg: expected 1 to 5"):
            corrupt_images(DIGITS, "jpeg", severity, 0)
    with pytest.raises(ValueError):
        corrupt_images(DIGITS, "jpeg", 1, 0, index_N=[0])
    with pytest.raises(Failure, match="corruption jpeg: there are no images"):
        corrupt_images(DIGITS[:0], "jpeg", 1, 0)
