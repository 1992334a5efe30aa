"""Models on disk: a folder with model.safetensors (weights) and model.json (what they are weights of, and their sha256)."""

import hashlib
import json
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as serialized
from torch import nn

from pipeline.config import flat
from pipeline.errors import Failure
from pipeline.files import digest, read_json
from pipeline.models.build import Spec, build

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
    path = folder / "model.json"
    found, wanted = read_json(path, REMEDY), spec.plain()
    if not isinstance(found, dict):
        raise Failure(f"{path}: holds {type(found).__name__}, expected a model's description; {REMEDY}")
    sha256 = found.pop("sha256", None)
    found, wanted = flat(found), flat(wanted)
    for key in sorted(found.keys() | wanted.keys()):
        if found.get(key) != wanted.get(key):
            raise Failure(f"{path}: {key} is {found.get(key)!r} there and {wanted.get(key)!r} here; {REMEDY}")
    model = build(spec)
    weights = folder / "model.safetensors"
    try:
        if digest(weights) != sha256:
            raise Failure(f"{weights}: not the weights that {path.name} describes (sha256); {REMEDY}")
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
