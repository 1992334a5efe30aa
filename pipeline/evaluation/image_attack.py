"""Adversarial images: pixels moved by at most eps each (the L-infinity norm), so that a model's loss rises. Untargeted.

FGSM takes one step along the sign of the gradient (Goodfellow et al. 2015, arXiv 1412.6572), PGD many small ones from a random
start (Madry et al. 2018, arXiv 1706.06083). Pixels are in [0, 1] and stay there; eps is in the same units, n of 255 levels are
n / 255.

Shapes: B images, C channels, H x W pixels.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from pipeline.evaluation.attack import finite

# The step of PGD, as a share of eps.
STEP = 0.15

# From pixels (B, C, H, W) to the loss of each image (B,).
Loss = Callable[[Tensor], Tensor]


def fgsm(loss: Loss, pixels_BCHW: Tensor, eps: float) -> Tensor:
    """Images (B, C, H, W) one step of `eps` away.

    The model has to be in eval mode. Raises Failure if a loss or its gradient is not finite.
    """
    return (pixels_BCHW + eps * _ascent(loss, pixels_BCHW)[1].sign()).clamp(0, 1)


def pgd(loss: Loss, pixels_BCHW: Tensor, eps: float, seed: int, index_B: Sequence[int] | Tensor, steps: int = 20) -> Tensor:
    """Of the clean image, a random start and `steps` steps from there, the image with the highest loss (B, C, H, W).

    So more steps never make a weaker attack, and none lowers the loss. `seed` and which image it is (`index`) decide
    the start, the same for every model and eps but for its size. Costs `steps` gradients and two losses.

    The model has to be in eval mode. Raises Failure if a loss or its gradient is not finite.
    """
    low_BCHW, high_BCHW = (pixels_BCHW - eps).clamp(min=0), (pixels_BCHW + eps).clamp(max=1)
    draws = [
        np.random.default_rng((seed, int(index))).uniform(-1, 1, pixels_CHW.shape)
        for index, pixels_CHW in zip(index_B, pixels_BCHW, strict=True)
    ]
    moved_BCHW = pixels_BCHW + eps * torch.from_numpy(np.stack(draws)).to(pixels_BCHW)
    worst = pixels_BCHW, _loss(loss, pixels_BCHW)
    for _ in range(steps):
        moved_BCHW = moved_BCHW.clamp(low_BCHW, high_BCHW)
        loss_B, gradient_BCHW = _ascent(loss, moved_BCHW)
        worst = _worse(*worst, moved_BCHW, loss_B)
        moved_BCHW = moved_BCHW + STEP * eps * gradient_BCHW.sign()
    moved_BCHW = moved_BCHW.clamp(low_BCHW, high_BCHW)
    return _worse(*worst, moved_BCHW, _loss(loss, moved_BCHW))[0]


def _worse(pixels_BCHW: Tensor, loss_B: Tensor, other_BCHW: Tensor, other_B: Tensor) -> tuple[Tensor, Tensor]:
    """Of two versions of each image the one with the higher loss, and that loss."""
    return torch.where((other_B > loss_B)[:, None, None, None], other_BCHW, pixels_BCHW), torch.maximum(loss_B, other_B)


def _ascent(loss: Loss, pixels_BCHW: Tensor) -> tuple[Tensor, Tensor]:
    """The loss (B,) and its gradient (B, C, H, W); none is left at the parameters."""
    with torch.enable_grad():
        pixels_BCHW = pixels_BCHW.detach().requires_grad_()
        loss_B = loss(pixels_BCHW)
        (gradient_BCHW,) = torch.autograd.grad(loss_B.sum(), pixels_BCHW)
    return finite(loss_B.detach(), "loss"), finite(gradient_BCHW, "gradient")


@torch.no_grad()
def _loss(loss: Loss, pixels_BCHW: Tensor) -> Tensor:
    return finite(loss(pixels_BCHW), "loss")
