"""What was found out about data, and the params that it asks for."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from ruamel.yaml import YAML

from pipeline.config import RESERVED

FEW = 10  # training examples of a class
IMBALANCE, MAJORITY = 10, 0.8  # the largest class over the smallest, and its share of test
DRAWN = "; without splits, which are drawn"
POINTS = 5  # within which a test should tell an accuracy, in points


@dataclass
class Findings:
    """`facts` by their names, as JSON has them; `warnings`, a line each; `problem`, for which `prepare` would refuse it.

    `params` are sections of params.yaml, `notes` are on their keys, `preset` is where they belong if not into that as it is.
    """

    path: str
    facts: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    problem: str | None = None
    params: dict[str, Any] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    preset: str | None = None

    def as_json(self) -> dict[str, Any]:
        more = {"warnings": self.warnings, "problem": self.problem, "params": self.params, "preset": self.preset}
        return {"path": self.path} | self.facts | more

    def warn(self, line: str) -> None:
        self.warnings.append(line)


def as_yaml(found: Findings) -> str:
    """The params as they stand in params.yaml, with the notes as comments."""
    lines = []
    for section, keys in found.params.items():
        lines.append(f"{section}:")
        for key, value in keys.items():
            nested = value if isinstance(value, dict) else {}
            line = f"  {key}:" if nested else f"  {key}: {_scalar(value)}"
            note = found.notes.get(f"{section}.{key}")
            lines.append(f"{line:<26} # {note}" if note else line)
            lines += [f"    {_scalar(name)}: {_scalar(source)}" for name, source in nested.items()]
    return "\n".join(lines) + "\n"


def _scalar(value: Any) -> str:
    """A value in YAML, plain where that is read back as the same."""
    if isinstance(value, str) and re.fullmatch(r"[\w./-]+", value) and YAML(typ="safe").load(value) == value:
        return value
    return json.dumps(value, ensure_ascii=False)


def task_name(path: Path) -> str:
    """A name for a task, of that of its file or folder."""
    stem = re.sub("[^A-Za-z0-9_-]+", "-", path.name.partition(".")[0]).strip("-_")
    return stem if stem and stem not in RESERVED else "mine"


def spread(values: np.ndarray) -> dict[str, int]:
    """Least, median, 95 % and most."""
    places = zip(("min", "median", "95 %", "max"), np.percentile(values, (0, 50, 95, 100), method="nearest"), strict=True)
    return {name: int(value) for name, value in places}


def percent(share: float) -> str:
    """With enough digits to tell a small share from none."""
    if 0 < share < 0.001:
        return f"{max(100 * share, 0.001):.3f} %"
    return f"{100 * share:.1f} %"


def duplicates(found: Findings, unit: str, hashes: dict[str, np.ndarray], labels: dict[str, np.ndarray] | None = None) -> None:
    """Of texts or images that are known by a hash: how many repeat another, within a split and between two."""
    repeated = {split: len(values) - len(np.unique(values)) for split, values in hashes.items()}
    for split, other in (("valid", "train"), ("test", "train"), ("test", "valid")):
        repeated[f"{split} in {other}"] = int(np.isin(hashes[split], hashes[other]).sum())
    found.facts["duplicates"] = repeated
    for split, harm in (("test", "scores count what is remembered"), ("valid", "the model that remembers most is kept")):
        if count := repeated[f"{split} in train"]:
            share = percent(count / len(hashes[split]))
            found.warn(f"{count:,} {unit} of {split} ({share}) are in train too: {harm}; remove them from one of the two")
    if labels is not None:
        pairs = np.unique(np.stack([np.concatenate([*values.values()]).astype(np.uint64) for values in (hashes, labels)]), axis=1)
        if count := int((np.unique(pairs[0], return_counts=True)[1] > 1).sum()):
            found.warn(f"{unit} under several labels: {count:,}; no answer to these is right every time; decide for one label")


def classes(found: Findings, unit: str, counts: dict[str, dict[str, int]]) -> None:
    """Sizes of classes by their split, and what they mean for scores."""
    found.facts["classes"] = counts
    train = {name: count["train"] for name, count in counts.items()}
    small = sorted((name for name in train if train[name] < FEW), key=train.__getitem__)
    if small:
        found.warn(
            f"{_number(small, 'class has', 'classes have')} under {FEW} {unit} in train, such as '{small[0]}' with "
            f"{train[small[0]]}: too few to learn from, and macro-F1 counts each class alike; add some, or join classes"
        )
    if untested := [name for name in counts if not counts[name]["test"]]:
        found.warn(f"{_number(untested, 'class is', 'classes are')} not in test, such as '{untested[0]}': no score is about them")
    largest, smallest = max(train, key=train.__getitem__), min(train, key=train.__getitem__)
    tested = sum(count["test"] for count in counts.values())
    always = counts[largest]["test"] / tested
    if always > MAJORITY or train[largest] > IMBALANCE * train[smallest]:
        found.warn(
            f"class '{largest}' is {train[largest] / train[smallest]:,.0f} times as large as '{smallest}': always answering "
            f"'{largest}' is right in {percent(always)} of test; read macro-F1 beside accuracy"
        )
    if (points := 98 / tested**0.5) > POINTS:
        found.warn(f"test has {tested:,} {unit}, which tell an accuracy to within {points:.0f} points (95 %); give it more")


def _number(names: Sequence[str], one: str, more: str) -> str:
    return f"{len(names):,} {one if len(names) == 1 else more}"
