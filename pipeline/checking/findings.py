"""What was found out about data, and the params that it asks for."""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ruamel.yaml import YAML

from pipeline.config import RESERVED

FEW = 10  # training examples of a class
IMBALANCE, MAJORITY = 10, 0.8  # the largest class over the smallest, and its share of test
DRAWN = "; without splits, which are drawn"
POINTS = 5  # within which a test should tell an accuracy, in points
NAMED, SAMPLES = 10, 3  # classes, and texts or images, that a warning names
# How data says which split something is in.
RECORDS = "by a field 'split' in the file"
FOLDERS = "by folders train/<class>/, valid/<class>/ and test/<class>/"
ARRAYS = "by x_train, x_valid and x_test, or is_test"


@dataclass
class Findings:
    """`facts` by their names, as JSON has them; `warnings`, a line each; `problem`, for which `prepare` would refuse it.

    `params` are sections of params.yaml, `notes` are on their keys, `preset` is where they belong if not into that as it is.
    `dividing` says how the data can give its splits; empty, if it cannot.
    """

    path: str
    facts: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    problem: str | None = None
    params: dict[str, Any] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    preset: str | None = None
    dividing: str = ""

    def as_json(self) -> dict[str, Any]:
        more = {"warnings": self.warnings, "problem": self.problem, "params": self.params, "preset": self.preset}
        return {"path": self.path} | self.facts | more

    def warn(self, line: str) -> None:
        self.warnings.append(line)

    def advise(self, line: str) -> None:
        """A warning whose remedy is another split."""
        self.warn(f"{line}, {self.dividing}" if self.dividing else line)


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


class Known(NamedTuple):
    """Texts or images of a split by hashes (N,): as a model sees them, and as they are; `names` tells where some of them are."""

    seen: np.ndarray
    exact: np.ndarray
    labels: np.ndarray
    names: Callable[[list[int]], list[str]]


def duplicates(found: Findings, unit: str, known: dict[str, Known], alike: str, labelled: bool) -> None:
    """How many texts or images repeat another, within a split and between two.

    `alike` says what those have in common that are the same only as a model sees them.
    """
    repeated = {split: len(of.seen) - len(np.unique(of.seen)) for split, of in known.items()}
    for split, other in (("valid", "train"), ("test", "train"), ("test", "valid")):
        repeated[f"{split} in {other}"] = int(np.isin(known[split].seen, known[other].seen).sum())
    found.facts["duplicates"] = repeated
    for split, harm in (("test", "scores count what is remembered"), ("valid", "the model that remembers most is kept")):
        if count := repeated[f"{split} in train"]:
            ours, train = known[split], known["train"]
            again = np.isin(ours.seen, train.seen)
            changed = int((again & ~np.isin(ours.exact, train.exact)).sum())
            only = f" ({changed:,} of them only {alike})" if changed else ""
            samples = np.flatnonzero(again)[:SAMPLES]
            first = [int((train.seen == ours.seen[i]).argmax()) for i in samples]
            pairs = zip(ours.names(samples.tolist()), train.names(first), strict=True)
            such = ", ".join(name if name == other else f"{name} (train: {other})" for name, other in pairs)
            found.warn(
                f"{count:,} {unit} of {split} ({percent(count / len(ours.seen))}) are in train too{only}: {harm}; remove them "
                f"from one of the two, such as {such}"
            )
    if labelled:
        every = (np.concatenate([getattr(of, name) for of in known.values()]) for name in ("seen", "labels"))
        pairs = np.unique(np.stack([values.astype(np.uint64) for values in every]), axis=1)
        if count := int((np.unique(pairs[0], return_counts=True)[1] > 1).sum()):
            found.warn(f"{unit} under several labels: {count:,}; no answer to these is right every time; decide for one label")


def classes(found: Findings, unit: str, counts: dict[str, dict[str, int]], groups: int | None = None) -> None:
    """Sizes of classes by their split, and what they mean for scores; `groups` are those of test, if that has any."""
    found.facts["classes"] = counts
    train = {name: count["train"] for name, count in counts.items()}
    small = sorted((name for name in train if train[name] < FEW), key=train.__getitem__)
    if small:
        found.warn(
            f"{_number(small, 'class has', 'classes have')} under {FEW} {unit} in train, such as '{small[0]}' with "
            f"{train[small[0]]}: too few to learn from, and macro-F1 counts each class alike; add some, or join classes"
        )
    for split, harm in (("valid", "the model to keep is chosen without"), ("test", "no score is about")):
        if missing := [name for name in counts if not counts[name][split]]:
            names = ", ".join(f"'{name}'" for name in missing[:NAMED]) + (", ..." if len(missing) > NAMED else "")
            one, them = ("class of train is", "it") if len(missing) == 1 else ("classes of train are", "them")
            found.advise(f"{len(missing):,} {one} not in {split} ({names}), so {harm} {them}; put {unit} of {them} there")
    largest, smallest = max(train, key=train.__getitem__), min(train, key=train.__getitem__)
    tested = sum(count["test"] for count in counts.values())
    always = counts[largest]["test"] / tested
    if always > MAJORITY or train[largest] > IMBALANCE * train[smallest]:
        found.warn(
            f"class '{largest}' is {train[largest] / train[smallest]:,.0f} times as large as '{smallest}': always answering "
            f"'{largest}' is right in {percent(always)} of test; read macro-F1 beside accuracy"
        )
    if (points := 98 / (groups or tested) ** 0.5) > POINTS:
        if groups and groups < tested:
            found.advise(
                f"test has {tested:,} {unit} of {_number(range(groups), 'group', 'groups')}, which tell an accuracy to within "
                f"{points:.0f} points (95 %) if {unit} of a group are alike; give it more groups"
            )
        else:
            found.advise(f"test has {tested:,} {unit}, which tell an accuracy to within {points:.0f} points (95 %); give it more")


def place_in(path: Path, place: str) -> str:
    """A place without the name of the file or folder that it is in."""
    return place.removeprefix(str(path)).lstrip("/, ") or place


def _number(names: Sequence[str], one: str, more: str) -> str:
    return f"{len(names):,} {one if len(names) == 1 else more}"
