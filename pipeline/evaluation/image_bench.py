"""Classifiers of images under corruptions, attacks and shifts, image by image, and what the routing does meanwhile.

Shapes: S images, P patches, L layers, V versions of an image, K assignments per patch; in pictures R rows and K columns of
patches.
"""

from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.config import ImageRobustness
from pipeline.data.batches import evenly
from pipeline.data.image_noise import corrupt_images
from pipeline.data.images import Images, spaced_images
from pipeline.errors import Failure
from pipeline.evaluation.image_attack import fgsm, pgd
from pipeline.evaluation.pictures import CLEAN, Coded, Pictures, nearest_patches
from pipeline.evaluation.records import Record
from pipeline.evaluation.robustness import BATCH, Effect, Trace, classifier_effect
from pipeline.evaluation.routing import collapse
from pipeline.models.vit import Vit
from pipeline.moe.layer import Mode
from pipeline.moe.quantizers.base import watched
from pipeline.progress import Progress
from pipeline.training.validation import RoutingTally, Watch

# What pictures are made of: images, kinds of noise, about this severity, and patches of a code.
SHOWN, SHOWN_KINDS, SHOWN_SEVERITY, NEAREST = 2, 2, 3, 8


class ImageBench:
    """Puts classifiers of images under the corruptions and attacks of params, and shifts."""

    def __init__(self, settings: ImageRobustness, seed: int, progress: Progress) -> None:
        self.settings, self.seed, self.progress = settings, seed, progress

    def test(
        self,
        model: Vit,
        mode: Mode,
        record: Record,
        test: Images,
        shifts: Mapping[str, Images] = {},
        outside: Mapping[str, Images] = {},
    ) -> tuple[RoutingTally, list[dict[str, float]]]:
        some = spaced_images(test, self.settings.images)
        pixels_SCHW, labels_S = torch.from_numpy(np.array(some.pixels_NCHW)), torch.from_numpy(np.array(some.labels_N))
        experts, tally = model.moe_layers[0].experts.count, RoutingTally(model)
        clean = image_trace(model, pixels_SCHW / 255, mode, tally)
        source_SP = torch.arange(clean.index[0].shape[1]).expand(len(labels_S), -1)
        record.add("clean", "clean", 0.0, classifier_effect(clean, clean, labels_S, source_SP, experts))
        for kind in self.settings.kinds:
            for severity in self.settings.severities:
                noisy_SCHW = corrupt_images(pixels_SCHW, kind, severity, self.seed)
                noisy = image_trace(model, noisy_SCHW / 255, mode)
                record.add("noise", kind, float(severity), classifier_effect(clean, noisy, labels_S, source_SP, experts))
                self.progress.advance()
        rows = torch.from_numpy(evenly(len(labels_S), self.settings.attack_images))
        base = clean.some(rows)
        for kind in self.settings.attacks:
            for eps in self.settings.attack_eps:
                hurt = self._attacked(kind, eps, model, mode, pixels_SCHW[rows] / 255, labels_S[rows])
                attacked = image_trace(model, hurt, mode)
                record.add("attack", kind, eps, classifier_effect(base, attacked, labels_S[rows], source_SP[rows], experts))
                self.progress.advance()
        for name, shift in shifts.items():
            record.add("shift", name, 0.0, self._shifted(model, mode, name, shift, test))
        for name, others in outside.items():
            pixels = torch.from_numpy(np.array(spaced_images(others, self.settings.images).pixels_NCHW))
            record.add("outside", name, 0.0, told_apart(clean.scores, image_trace(model, pixels / 255, mode).scores))
        valid_ST = torch.ones(len(labels_S), len(model.positions_TD), dtype=torch.bool)
        return tally, collapse(model, lambda rows: model(pixels_SCHW[rows] / 255, mode)[1], valid_ST)

    def _attacked(self, kind: str, eps: float, model: Vit, mode: Mode, pixels_SCHW: Tensor, labels_S: Tensor) -> Tensor:
        found = []
        pixels_SCHW, labels_S = pixels_SCHW.to(model.device), labels_S.to(model.device)
        for rows in torch.arange(len(labels_S)).split(BATCH):

            def loss(pixels_BCHW: Tensor, rows: Tensor = rows) -> Tensor:
                return F.cross_entropy(model(pixels_BCHW, mode)[0], labels_S[rows], reduction="none")

            if kind == "fgsm":
                found.append(fgsm(loss, pixels_SCHW[rows], eps / 255))
            else:
                steps = self.settings.attack_steps
                found.append(pgd(loss, pixels_SCHW[rows], eps / 255, steps=steps, seed=self.seed, index_B=rows))
        return torch.cat(found).cpu()

    def _shifted(self, model: Vit, mode: Mode, name: str, shift: Images, test: Images) -> Effect:
        """The model chooses among the shift's classes alone; what is lost is against clean test images of those classes."""
        among = torch.from_numpy(np.unique(shift.labels_N))
        own = np.flatnonzero(np.isin(test.labels_N, among.numpy()))
        if not len(own):
            raise Failure(f"data.shifts: the test split has no image of the classes of {name}; drop it")

        def right(images: Images) -> np.ndarray:
            some = spaced_images(images, self.settings.images)
            scores_SL = image_trace(model, torch.from_numpy(np.array(some.pixels_NCHW)) / 255, mode).scores
            return (among[scores_SL[:, among].argmax(1)] == torch.from_numpy(np.array(some.labels_N))).double().numpy()

        right_S, clean_S = right(shift), right(Images(test.pixels_NCHW[own], test.labels_N[own]))
        return Effect(right_S, clean_S.mean() - right_S, clean_S=clean_S)


def told_apart(clean_SL: Tensor, outside_UL: Tensor) -> Effect:
    """How well a model's confidence, its largest probability, tells images of its classes from others: the area under the ROC.

    The score of an image outside is the share of clean images that the model is surer of, that of a clean one the share of
    images outside that it is less sure of, ties half; the mean of either is the area.
    """
    clean_S, outside_U = (scores.double().softmax(1).amax(1).numpy() for scores in (clean_SL, outside_UL))
    score_U = 1 - _below(clean_S, outside_U)
    return Effect(score_U, 1 - score_U, clean_S=_below(outside_U, clean_S))


def _below(values: np.ndarray, given: np.ndarray) -> np.ndarray:
    """Share of the values below each of the given ones, equal ones half."""
    ranked = np.sort(values)
    return (ranked.searchsorted(given, "left") + ranked.searchsorted(given, "right")) / (2 * len(values))


@torch.no_grad()
def image_trace(model: Vit, pixels_SCHW: Tensor, mode: Mode, watch: Watch | None = None) -> Trace:
    """Class scores (S, classes) of images with pixels in [0, 1], and per layer the experts of every patch (S, P, K)."""
    scores, index = [], []
    for rows in torch.arange(len(pixels_SCHW)).split(BATCH):
        scores_BL, hidden = model(pixels_SCHW[rows], mode)
        if watch is not None:
            watch(hidden)
        scores.append(scores_BL.float().cpu())
        index.append([model.patches(output.index_NK).cpu() for output in hidden.layers])
    return Trace(torch.cat(scores), [torch.cat(parts) for parts in zip(*index, strict=True)])


@torch.no_grad()
def pictures(model: Vit, mode: Mode, test: Images, settings: ImageRobustness, seed: int) -> Pictures:
    """Of `SHOWN` test images and the first kinds of noise, at a middle severity."""
    some, severity = spaced_images(test, SHOWN), min(settings.severities, key=lambda one: abs(one - SHOWN_SEVERITY))
    clean_SCHW = torch.from_numpy(np.array(some.pixels_NCHW))
    versions = {CLEAN: clean_SCHW}
    versions |= {f"{kind} {severity}": corrupt_images(clean_SCHW, kind, severity, seed) for kind in settings.kinds[:SHOWN_KINDS]}
    pixels_SVCHW = torch.stack(list(versions.values()), 1)
    size = pixels_SVCHW.shape[:2]
    scores_NL, hidden = model(pixels_SVCHW.flatten(0, 1) / 255, mode)
    scores_NL, layers = scores_NL.float().cpu(), [output.cpu() for output in hidden.layers]

    def placed(index_LN: list[Tensor]) -> np.ndarray:
        return np.stack([model.patches(index_N).view(*size, *model.grid).numpy() for index_N in index_LN])

    coded = layers[0].code_N is not None
    return Pictures(
        tuple(versions),
        pixels_SVCHW.numpy(),
        np.array(some.labels_N),
        scores_NL.argmax(1).view(size).numpy(),
        model.expert_blocks,
        placed([output.index_NK[:, 0] for output in layers]),
        placed([output.code_N for output in layers]) if coded else None,
        _nearest(model, mode, spaced_images(test, settings.images)) if coded else {},
    )


def _nearest(model: Vit, mode: Mode, images: Images) -> dict[int, dict[int, Coded]]:
    """For each block the patches whose states are nearest to each code."""
    pixels_SCHW = torch.from_numpy(np.array(images.pixels_NCHW))
    quantizers, patch, nearest = [layer.quantizer for layer in model.moe_layers], model.shape[1] // model.grid[0], {}
    codes: list[list[Tensor]] = [[] for _ in quantizers]
    with watched(quantizers) as distances:
        for rows in torch.arange(len(pixels_SCHW)).split(BATCH):
            for kept, output in zip(codes, model(pixels_SCHW[rows] / 255, mode)[1].layers, strict=True):
                kept.append(output.code_N.cpu())
    for block, quantizer, code, distance in zip(model.expert_blocks, quantizers, codes, distances, strict=True):
        code_SP, distance_SP = (model.patches(torch.cat(one)).numpy() for one in (code, distance))
        nearest[block] = nearest_patches(pixels_SCHW.numpy(), code_SP, distance_SP, patch, quantizer.codes, NEAREST)
    return nearest
