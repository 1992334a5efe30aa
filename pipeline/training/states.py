"""What a training needs to go on where it was cut off: states on disk, each whole and checked, of which the last two are kept.

A state is a tree of dicts with text keys, lists, tensors, and what JSON knows.
"""

import hashlib
import json
import re
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from pipeline import ranks
from pipeline.errors import Failure
from pipeline.files import output_file

KEPT = 2
_NAME = re.compile(r"(\d{9,})-([0-9a-f]{64})\.safetensors")
_TENSOR = "tensor"  # the key of a dict that stands for a tensor

Tree = Any


@runtime_checkable
class Stateful(Protocol):
    """What a training carries from step to step."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Any) -> Any: ...


class States:
    """States of one training in a folder, written every so many steps or seconds, whichever comes first.

    The name of a file has the digest of what is in it, so that one which a power failure or a disk has damaged is known, and
    the one before is taken. A state that cannot be written costs a warning, not the training.
    """

    def __init__(self, folder: Path, steps: int, seconds: float) -> None:
        self.folder, self.steps, self.seconds = folder, steps, seconds
        self._step, self._time, self._warned = 0, time.monotonic(), False

    def of(self, name: str) -> "States":
        """Those of another training of the same stage."""
        return States(self.folder / name, self.steps, self.seconds)

    @property
    def begun(self) -> bool:
        """Whether there is a state of any training of the stage."""
        return any(_NAME.fullmatch(path.name) for path in self.folder.rglob("*.safetensors"))

    def due(self, step: int) -> bool:
        return step - self._step >= self.steps or time.monotonic() - self._time >= self.seconds

    def save(self, step: int, state: Tree) -> None:
        """Of ranks, the first one writes."""
        if ranks.rank():
            return
        tensors: list[Tensor] = []
        tree = _flat(state, tensors)
        content = save({str(place): tensor for place, tensor in enumerate(tensors)}, {"tree": json.dumps(tree)})
        self._step, self._time = step, time.monotonic()
        try:
            with output_file(self.folder / f"{step:09d}-{hashlib.sha256(content).hexdigest()}.safetensors") as path:
                path.write_bytes(content)
            for old in self._files()[KEPT:]:
                old.unlink()
        except (Failure, OSError) as error:
            if not self._warned:
                print(f"vqmoe: a state of the training cannot be kept, it goes on without: {error}", file=sys.stderr)
            self._warned = True

    def newest(self) -> Tree | None:
        """The newest state that is whole; None if there is none. Damaged ones are removed."""
        for path in self._files():
            content = path.read_bytes()
            step, sha256 = _NAME.fullmatch(path.name).groups()
            if hashlib.sha256(content).hexdigest() == sha256:
                self._step = int(step)
                return _tree(path)
            print(f"vqmoe: {path}: damaged; the training goes on from an earlier state", file=sys.stderr)
            path.unlink(missing_ok=True)  # another rank may have found it too
        return None

    def _files(self) -> list[Path]:
        """The newest first."""
        found = [path for path in self.folder.glob("*.safetensors") if _NAME.fullmatch(path.name)]
        return sorted(found, reverse=True)


def _flat(tree: Tree, tensors: list[Tensor]) -> Tree:
    """The tree as JSON has it; its tensors are put into a list, and stand there by their place."""
    if isinstance(tree, Tensor):
        tensors.append(tree.detach().contiguous())
        return {_TENSOR: len(tensors) - 1}
    if isinstance(tree, Mapping):
        assert all(isinstance(key, str) for key in tree) and _TENSOR not in tree, list(tree)
        return {key: _flat(value, tensors) for key, value in tree.items()}
    return [_flat(value, tensors) for value in tree] if isinstance(tree, list | tuple) else tree


def _tree(path: Path) -> Tree:
    with safe_open(path, "pt") as file:

        def full(tree: Tree) -> Tree:
            if isinstance(tree, dict):
                if _TENSOR in tree:
                    return file.get_tensor(str(tree[_TENSOR]))
                return {key: full(value) for key, value in tree.items()}
            return [full(value) for value in tree] if isinstance(tree, list) else tree

        return full(json.loads(file.metadata()["tree"]))
