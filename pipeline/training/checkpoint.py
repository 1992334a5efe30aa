"""Models on disk: a folder with model.safetensors (weights) and model.json (what they are weights of, and their sha256)."""

import hashlib
import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as serialized
from torch import nn

from pipeline.config import flat
from pipeline.errors import Failure
from pipeline.files import digest, read_json
from pipeline.models.build import Spec, build

DESCRIPTION = "model.json"
REMEDY = "run the stage that makes it again (`dvc repro`)"


def save(folder: Path, model: nn.Module, spec: Spec) -> None:
    """Write the model into an existing folder; the same weights give the same bytes."""
    content = serialized({name: tensor.contiguous() for name, tensor in model.state_dict().items()})
    (folder / "model.safetensors").write_bytes(content)
    described = spec.plain() | {"sha256": hashlib.sha256(content).hexdigest()}
    (folder / "model.json").write_text(json.dumps(described, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def load(folder: Path, spec: Spec) -> nn.Module:
    """The model of `folder`, in evaluation mode.

    Raises Failure with one line if a file is missing or damaged, or was written for another configuration than `spec`.
    """
    described, sha256 = _described(folder)
    found, wanted = flat(described), flat(spec.plain())
    for key in sorted(found.keys() | wanted.keys()):
        if found.get(key) != wanted.get(key):
            raise Failure(f"{folder / DESCRIPTION}: {key} is {found.get(key)!r} there and {wanted.get(key)!r} here; {REMEDY}")
    return _weighted(folder, spec, sha256)


def open_model(folder: Path) -> tuple[nn.Module, Spec]:
    """Whatever model is in `folder`, in evaluation mode, and its description. Raises Failure as `load` does."""
    described, sha256 = _described(folder)
    try:
        spec = Spec.model_validate(described)
    except (ValidationError, KeyError) as error:
        unknown = f"method {error}" if isinstance(error, KeyError) else ".".join(map(str, error.errors()[0]["loc"]))
        raise Failure(f"{folder / DESCRIPTION}: describes a model of another version ({unknown}); {REMEDY}") from None
    if spec.view is None:
        raise Failure(f"{folder / DESCRIPTION}: does not say what its texts or images looked like (view); {REMEDY}")
    return _weighted(folder, spec, sha256), spec


def _described(folder: Path) -> tuple[dict[str, Any], str | None]:
    """What model.json holds: a description, and the sha256 of the weights."""
    path = folder / DESCRIPTION
    found = read_json(path, REMEDY)
    if not isinstance(found, dict):
        raise Failure(f"{path}: holds {type(found).__name__}, expected a model's description; {REMEDY}")
    return found, found.pop("sha256", None)


def _weighted(folder: Path, spec: Spec, sha256: str | None) -> nn.Module:
    model = build(spec)
    weights = folder / "model.safetensors"
    try:
        if digest(weights) != sha256:
            raise Failure(f"{weights}: not the weights that {DESCRIPTION} describes (sha256); {REMEDY}")
        model.load_state_dict(load_file(weights))
    except FileNotFoundError:
        raise Failure(f"{weights}: not found; {REMEDY}") from None
    except (SafetensorError, OSError, RuntimeError) as error:
        raise Failure(f"{weights}: damaged ({str(error).splitlines()[0]}); {REMEDY}") from None
    return model.eval()


def labels(folder: Path) -> tuple[str, ...]:
    """Those of the classifier in `folder`."""
    path = folder / "model.json"
    found = read_json(path, REMEDY)
    if not isinstance(found, dict) or not isinstance(found.get("labels"), list):
        raise Failure(f"{path}: has no labels; {REMEDY}")
    return tuple(map(str, found["labels"]))
