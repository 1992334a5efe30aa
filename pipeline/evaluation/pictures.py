"""A few images with what the routing did to their patches, and the patches that each code stands for.

Shapes: N images, C channels, P patches of an image (row by row), S side of a patch, M nearest patches of a code; in `Pictures` S
images, V versions of each, L layers, R rows and K columns of patches.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from pipeline.errors import Failure
from pipeline.files import read_json, write_json

# The condition that the others of an image are compared with.
CLEAN = "clean"


class Coded(NamedTuple):
    """What a code quantizes: its share of all patches, their mean (NaN of none), and those nearest to it, the nearest first."""

    share: float
    mean_CSS: np.ndarray
    nearest_MCSS: np.ndarray


class Pictures(NamedTuple):
    """A few test images, clean and corrupted, with what a model made of them, and what its codes stand for.

    `pixels_SVCHW` uint8; `label_S` and `predicted_SV`; of each mixture layer, by its block, where patches went first:
    `expert_LSVRK` and, with a codebook, `code_LSVRK` (rows and columns of patches); `nearest` by block and code.
    """

    conditions: tuple[str, ...]
    pixels_SVCHW: np.ndarray
    label_S: np.ndarray
    predicted_SV: np.ndarray
    blocks: tuple[int, ...]
    expert_LSVRK: np.ndarray
    code_LSVRK: np.ndarray | None
    nearest: Mapping[int, Mapping[int, Coded]]

    def save(self, folder: Path) -> None:
        """As pictures.safetensors and pictures.json, into a folder that is not final yet."""
        arrays = {"pixels": self.pixels_SVCHW, "label": self.label_S, "predicted": self.predicted_SV, "expert": self.expert_LSVRK}
        if self.code_LSVRK is not None:
            arrays["code"] = self.code_LSVRK
        for block, codes in self.nearest.items():
            arrays[f"share/{block}"] = np.array([coded.share for coded in codes.values()])
            arrays[f"mean/{block}"] = np.stack([coded.mean_CSS for coded in codes.values()])
            arrays |= {f"nearest/{block}/{code}": coded.nearest_MCSS for code, coded in codes.items()}
        content = save({name: np.ascontiguousarray(array) for name, array in arrays.items()})
        (folder / "pictures.safetensors").write_bytes(content)
        write_json(folder / "pictures.json", {"conditions": self.conditions, "blocks": self.blocks})

    @classmethod
    def load(cls, folder: Path) -> "Pictures":
        """What `save` wrote. Raises Failure where it is missing or damaged."""
        path, remedy = folder / "pictures.safetensors", "run `dvc repro`"
        named = read_json(folder / "pictures.json", remedy)
        try:
            arrays = load_file(path)
            nearest = {
                block: {
                    code: Coded(share, arrays[f"mean/{block}"][code], arrays[f"nearest/{block}/{code}"])
                    for code, share in enumerate(arrays[f"share/{block}"].tolist())
                }
                for block in named["blocks"]
                if f"share/{block}" in arrays
            }
            given = (arrays[name] for name in ("pixels", "label", "predicted"))
            blocks, expert, code = tuple(named["blocks"]), arrays["expert"], arrays.get("code")
            found = cls(tuple(named["conditions"]), *given, blocks, expert, code, nearest)
        except (OSError, SafetensorError, LookupError, AttributeError, TypeError) as error:
            raise Failure(f"{path}: missing or damaged ({error}); {remedy}") from None
        named = (len(blocks), *found.label_S.shape, len(found.conditions))
        shapes = [(len(blocks), *array.shape[:2]) for array in (found.predicted_SV, found.pixels_SVCHW)]
        if {*shapes, expert.shape[:3]} != {named} or (code is not None and code.shape != expert.shape):
            raise Failure(f"{path}: damaged, not the images and blocks that pictures.json names; {remedy}")
        return found


def nearest_patches(
    pixels_NCHW: np.ndarray, code_NP: np.ndarray, distance_NP: np.ndarray, patch: int, codes: int, count: int
) -> dict[int, Coded]:
    """What each code quantizes in images (uint8), with `count` patches nearest to it, or all it has; of equals the first."""
    n, channels, height, width = pixels_NCHW.shape
    patches = pixels_NCHW.reshape(n, channels, height // patch, patch, width // patch, patch).transpose(0, 2, 4, 1, 3, 5)
    patches = patches.reshape(-1, channels, patch, patch)
    code_P, distance_P = code_NP.ravel(), distance_NP.ravel()
    found = {}
    for code in range(codes):
        own = np.flatnonzero(code_P == code)
        nearest = own[distance_P[own].argsort(kind="stable")[:count]]
        mean_CSS = patches[own].mean(0) if len(own) else np.full(patches.shape[1:], np.nan)
        found[code] = Coded(len(own) / len(code_P), mean_CSS, patches[nearest])
    return found
