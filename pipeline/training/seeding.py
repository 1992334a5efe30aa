"""The one place where randomness is seeded."""

import hashlib
import random
from typing import Any

import numpy as np
import torch


def seed_everything(seed: int, purpose: str) -> None:
    """Seed python, numpy and torch from (seed, purpose) and ask torch for deterministic algorithms.

    The purpose keeps stages apart: adding a draw in one does not move the numbers of another.
    """
    derived = int.from_bytes(hashlib.sha256(f"{purpose}:{seed}".encode()).digest()[:4], "little")
    random.seed(derived)
    np.random.seed(derived)
    torch.manual_seed(derived)
    # As `use_deterministic_algorithms` does, which loads torch's compiler too: two seconds of every stage.
    torch.set_deterministic_debug_mode("error")
    # It would also fill all memory that torch allocates, which only helps to find kernels that read it unwritten and
    # costs 5 % of a step.
    torch.utils.deterministic.fill_uninitialized_memory = False


def random_state() -> dict[str, Any]:
    """Where the generators of python, numpy and torch stand, as lists, numbers and tensors."""
    version, words, gauss = random.getstate()
    name, keys, *rest = np.random.get_state()
    return {
        "python": [version, list(words), gauss],
        "numpy": [name, keys.tolist(), *rest],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Put the generators back to what `random_state` found."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
