import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from pipeline.errors import Failure
from pipeline.evaluation.image_attack import fgsm, pgd

EPS = 0.1


def images(count=6):
    """Pixels of float64, some so near black or white that the ball reaches beyond."""
    draw = torch.rand(count, 3, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return (1.4 * draw - 0.2).clamp(0, 1)


def linear(pixels_BCHW):
    """A loss whose worst point in a ball is known: its gradient is the same everywhere."""
    return (pixels_BCHW * WEIGHT_CHW).sum((1, 2, 3))


WEIGHT_CHW = torch.randn(3, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


class Bent(nn.Module):
    """A small network whose loss has many maxima in a ball; remembers the pixels it saw."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.layers = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Tanh(), nn.Flatten(), nn.Linear(48, 4)).double()
        self.seen = []

    def forward(self, pixels_BCHW):
        self.seen.append(pixels_BCHW.detach())
        return (8 * self.layers(20 * pixels_BCHW)).sin().sum(1)


@pytest.fixture
def bent():
    return Bent()


def both(loss, pixels_BCHW, eps=EPS):
    return {"fgsm": fgsm(loss, pixels_BCHW, eps), "pgd": pgd(loss, pixels_BCHW, eps, 0, range(len(pixels_BCHW)))}


def test_the_worst_point_of_a_linear_loss_is_found():
    worst = (images() + EPS * WEIGHT_CHW.sign()).clamp(0, 1)
    for moved in both(linear, images()).values():
        assert torch.equal(moved, worst)


def test_fgsm_is_one_step_along_the_sign_of_the_gradient(bent):
    pixels = images().requires_grad_()
    (gradient,) = torch.autograd.grad(bent(pixels).sum(), pixels)
    assert torch.equal(fgsm(bent, images(), EPS), (images() + EPS * gradient.sign()).clamp(0, 1))


def test_pgd_is_the_documented_search(bent):
    """The clean image is tried, a random start, and steps of 0.15 eps along the sign of the gradient, projected."""
    pgd(bent, images(), EPS, 0, range(6), steps=4)
    clean, *path = bent.seen
    assert torch.equal(clean, images()) and len(path) == 5
    for before, after in pairwise(path):
        (gradient,) = torch.autograd.grad(bent(before.requires_grad_()).sum(), before)
        step = before.detach() + 0.15 * EPS * gradient.sign()
        assert torch.equal(after, step.clamp(images() - EPS, images() + EPS).clamp(0, 1))
    # Uniform where the ball is whole.
    inside = (images() > EPS) & (images() < 1 - EPS)
    start = ((path[0] - images()) / EPS).detach()[inside]
    assert abs(start.mean()) < 0.15 and start.std() == pytest.approx(1 / math.sqrt(3), rel=0.15) and start.abs().max() > 0.95


@pytest.mark.parametrize("eps", [0.01, 0.1, 2.0])
def test_results_are_in_the_ball_and_pixels(bent, eps):
    for moved in both(bent, images(), eps).values():
        assert ((moved - images()).abs() <= eps + 1e-12).all()
        assert moved.min() >= 0 and moved.max() <= 1 and not moved.requires_grad


def test_no_eps_changes_nothing(bent):
    for moved in both(bent, images(), 0).values():
        assert torch.equal(moved, images())


def test_seed_and_index_decide_the_start(bent):
    moved = pgd(bent, images(), EPS, 3, torch.arange(6), steps=2)
    assert torch.equal(pgd(bent, images(), EPS, 3, range(6), steps=2), moved)
    assert torch.allclose(pgd(bent, images()[[4, 1]], EPS, 3, [4, 1], steps=2), moved[[4, 1]], atol=1e-12)
    assert not torch.allclose(pgd(bent, images(), EPS, 4, range(6), steps=2), moved)
    assert not torch.allclose(pgd(bent, images(), EPS, 3, range(1, 7), steps=2), moved)


def test_more_steps_never_lower_a_loss(bent):
    losses = [bent(images())] + [bent(pgd(bent, images(), EPS, 0, range(6), steps=steps)) for steps in range(1, 25)]
    assert all((after >= before).all() for before, after in pairwise(losses))
    # Which takes memory: the last iterate has not always the highest loss.
    bent.seen.clear()
    pgd(bent, images(), EPS, 0, range(6), steps=24)
    assert (bent(bent.seen[-1]) < losses[-1]).any() and (losses[-1] > losses[1]).any()


def test_an_attack_that_fails_leaves_the_image():
    """Of a loss with its peak at the clean image, it is the worst point."""
    moved = pgd(lambda pixels: -(pixels - images()).abs().sum((1, 2, 3)), images(), EPS, 0, range(6))
    assert torch.equal(moved, images())


def test_the_model_stays_as_it_was(bent):
    for parameter in bent.parameters():
        parameter.grad = torch.ones_like(parameter)
    pixels = images()
    with torch.no_grad():
        both(bent, pixels)
    assert torch.equal(pixels, images()) and not pixels.requires_grad
    for parameter in bent.parameters():
        assert torch.equal(parameter.grad, torch.ones_like(parameter)) and parameter.requires_grad


@pytest.mark.parametrize("attack", [fgsm, lambda loss, pixels, eps: pgd(loss, pixels, eps, 0, range(6), steps=2)])
def test_what_is_not_finite_is_an_error(attack):
    with pytest.raises(Failure, match="the loss under attack is not finite"):
        attack(lambda pixels: linear(pixels).log() * math.nan, images(), EPS)
    with pytest.raises(Failure, match="the gradient under attack is not finite"):
        attack(lambda pixels: (pixels - pixels.detach()).sqrt().sum((1, 2, 3)), images(), EPS)


def test_a_loss_without_gradient_is_checked_too():
    with pytest.raises(Failure, match="the loss under attack is not finite"):
        pgd(lambda pixels: linear(pixels) * (1 if torch.is_grad_enabled() else math.nan), images(), EPS, 0, range(6))


def test_each_image_has_an_index():
    with pytest.raises(ValueError):
        pgd(linear, images(), EPS, 0, [0])
