"""Common corruptions of images at severities 1 to 5, of ImageNet-C (Hendrycks and Dietterich 2019, arXiv 1903.12261).

| kind | level at severities 1 to 5 | what a level is |
|---|---|---|
| gaussian_noise | 0.04 0.06 0.08 0.09 0.10 | standard deviation; white is 1 |
| shot_noise | 500 250 100 75 50 | photons that make white |
| impulse_noise | 0.01 0.02 0.03 0.05 0.07 | share of the values that become 0 or 1 |
| gaussian_blur | 0.4 0.6 0.7 0.8 1 | standard deviation in pixels |
| motion_blur | 1 1.5 2 2.25 2.5 | standard deviation in pixels, to one side |
| brightness | 0.05 0.1 0.15 0.2 0.3 | added to the value of HSV |
| contrast | 0.75 0.5 0.4 0.3 0.15 | share of the distance to a channel's mean that is left |
| pixelate | 0.95 0.9 0.85 0.75 0.65 | inverse of a block's side in pixels |
| jpeg | 80 65 58 50 40 | quality |

They are the constants of CIFAR-10-C (github.com/hendrycks/robustness, ImageNet-C/create_c/make_cifar_c.py), but for motion_blur
at 4: theirs differ from those at 3 in nothing but how far out the density is cut, where it is 0 already, so that 3 and 4 are the
same; here 4 is between its neighbours. They are for images of 32 x 32. In larger ones what is in pixels grows with the shorter
side: the width of a blur, and by how much a block is larger than a pixel, which comes near what ImageNet-C has. In smaller ones
it does not shrink, since a blur much narrower than a pixel changes nothing. The grid of pixelate starts anywhere, where theirs
starts in the corner: in small images it would often merge the same pixels at two severities.

Shapes: N images, C channels (1 or 3), H x W pixels; T points along a motion. Images are float in [0, 1] while they are changed.
"""

import math
from collections.abc import Iterable
from io import BytesIO

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as vision

from pipeline.data.corruption import rng_for
from pipeline.errors import Failure, UsageError, nearest

# Where a normal density is cut, in standard deviations.
_REACH = 4


def gaussian_noise(image_CHW: Tensor, level: float, rng: np.random.Generator) -> Tensor:
    """Add normal noise."""
    return image_CHW + level * torch.from_numpy(rng.standard_normal(image_CHW.shape))


def shot_noise(image_CHW: Tensor, level: float, rng: np.random.Generator) -> Tensor:
    """Count `level` photons where it is white, in proportion elsewhere."""
    return torch.from_numpy(rng.poisson(level * image_CHW.numpy())) / level


def impulse_noise(image_CHW: Tensor, level: float, rng: np.random.Generator) -> Tensor:
    """Set a share `level` of the values to 0 or 1 (salt and pepper), each channel by itself."""
    draw_CHW = torch.from_numpy(rng.random(image_CHW.shape))
    return image_CHW.masked_fill(draw_CHW < level / 2, 0).masked_fill(draw_CHW >= 1 - level / 2, 1)


def gaussian_blur(image_CHW: Tensor, level: float, rng: np.random.Generator) -> Tensor:
    """Blur alike in all directions."""
    sigma = level * _scale(image_CHW)
    size = 2 * math.ceil(_REACH * sigma) + 1
    # Columns, then rows: the same as both at once, and much faster where the blur is wide.
    return vision.gaussian_blur(vision.gaussian_blur(image_CHW, [1, size], [sigma]), [size, 1], [sigma])


def motion_blur(image_CHW: Tensor, level: float, rng: np.random.Generator) -> Tensor:
    """Blur along a line of random direction within 45 degrees of the horizontal, to one side, with half a normal density."""
    sigma, angle = level * _scale(image_CHW), rng.uniform(-math.pi / 4, math.pi / 4)
    way_T = torch.arange(0, _REACH * sigma)
    weight_T = (-((way_T / sigma) ** 2) / 2).exp()
    shift_T23 = torch.eye(2, 3).repeat(len(way_T), 1, 1)
    # An image is two units wide and high for affine_grid.
    shift_T23[:, 0, 2] = 2 / image_CHW.shape[2] * math.cos(angle) * way_T
    shift_T23[:, 1, 2] = 2 / image_CHW.shape[1] * math.sin(angle) * way_T
    grid_THW2 = F.affine_grid(shift_T23, [len(way_T), *image_CHW.shape], align_corners=False)
    moved_TCHW = F.grid_sample(image_CHW.expand(len(way_T), -1, -1, -1), grid_THW2, padding_mode="border", align_corners=False)
    return torch.tensordot(weight_T / weight_T.sum(), moved_TCHW, 1)


def brightness(image_CHW: Tensor, level: float, rng: np.random.Generator) -> Tensor:
    """Raise the value of HSV (a pixel's largest channel), with the same hue and saturation; black becomes grey."""
    value_1HW = image_CHW.amax(0, keepdim=True)
    brighter_1HW = (value_1HW + level).clamp(max=1)
    return torch.where(value_1HW > 0, image_CHW * (brighter_1HW / value_1HW), brighter_1HW)


def contrast(image_CHW: Tensor, level: float, rng: np.random.Generator) -> Tensor:
    """Bring each channel closer to its mean."""
    return torch.lerp(image_CHW.mean((1, 2), keepdim=True), image_CHW, level)


def pixelate(image_CHW: Tensor, level: float, rng: np.random.Generator) -> Tensor:
    """Give each pixel the mean of its block, on a grid that starts anywhere; a pixel is of the block that its centre is in."""
    side = 1 + (1 / level - 1) * _scale(image_CHW)
    rows_HH, columns_WW = (_block_means(size, side, rng.random()) for size in image_CHW.shape[1:])
    return rows_HH @ image_CHW @ columns_WW.T


def jpeg(image_CHW: Tensor, level: int, rng: np.random.Generator) -> Tensor:
    """Compress, with quality `level`, and decompress; by Pillow, since torchvision gives its own codec up."""
    bytes_CHW = _bytes(image_CHW)
    file = BytesIO()
    Image.fromarray(bytes_CHW.permute(1, 2, 0).squeeze(2).numpy()).save(file, "JPEG", quality=level)
    return vision.pil_to_tensor(Image.open(file)) / 255


LEVELS = {
    gaussian_noise: (0.04, 0.06, 0.08, 0.09, 0.10),
    shot_noise: (500, 250, 100, 75, 50),
    impulse_noise: (0.01, 0.02, 0.03, 0.05, 0.07),
    gaussian_blur: (0.4, 0.6, 0.7, 0.8, 1.0),
    motion_blur: (1.0, 1.5, 2.0, 2.25, 2.5),
    brightness: (0.05, 0.1, 0.15, 0.2, 0.3),
    contrast: (0.75, 0.5, 0.4, 0.3, 0.15),
    pixelate: (0.95, 0.9, 0.85, 0.75, 0.65),
    jpeg: (80, 65, 58, 50, 40),
}
KINDS = {kind.__name__: kind for kind in LEVELS}


def corrupt_images(
    pixels_NCHW: Tensor | np.ndarray, kind: str, severity: int, seed: int, index_N: Iterable[int] | None = None
) -> Tensor:
    """Images (N, C, H, W) of uint8 with one corruption by name, as a tensor.

    `index_N` says which images these are, by default 0 to N-1: seed, kind, severity and index decide an image's draws, so that
    it comes out the same in any batch and for any model.

    Raises UsageError for another name or severity, Failure for no images.
    """
    if kind not in KINDS:
        raise UsageError(f"corruption '{kind}' does not exist; there are: {', '.join(KINDS)}{nearest(kind, KINDS)}")
    levels = LEVELS[KINDS[kind]]
    if severity not in range(1, len(levels) + 1):
        raise UsageError(f"severity {severity} of corruption {kind}: expected 1 to {len(levels)}")
    if not len(pixels_NCHW):
        raise Failure(f"corruption {kind}: there are no images; check the split")
    indices = range(len(pixels_NCHW)) if index_N is None else index_N
    # One image at a time: sums of floats may depend on what else is in a batch.
    noisy = [
        _bytes(KINDS[kind](image_CHW / 255, levels[severity - 1], rng_for(seed, kind, severity, index)))
        for index, image_CHW in zip(indices, torch.as_tensor(pixels_NCHW), strict=True)
    ]
    return torch.stack(noisy)


def _bytes(image_CHW: Tensor) -> Tensor:
    return (image_CHW * 255).round().clamp(0, 255).to(torch.uint8)


def _scale(image_CHW: Tensor) -> float:
    """How much larger than for 32 x 32 a number of pixels has to be."""
    return max(1.0, min(image_CHW.shape[1:]) / 32)


def _block_means(size: int, side: float, start: float) -> Tensor:
    """The mean of each pixel's block as a matrix (size, size), for a row of pixels cut at distances `side`."""
    block = (torch.arange(size) / side + start).floor()
    same = (block[:, None] == block).float()
    return same / same.sum(1, keepdim=True)
