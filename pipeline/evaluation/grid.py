"""What all runs of a grid left, by method and seed, and the values that its measures are means of.

Shapes: S seeds, U units (segments of the language model's test text, or passages of a task), L layers.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from pipeline.errors import Failure
from pipeline.evaluation.pictures import Pictures
from pipeline.evaluation.statistics import Draws, Estimate, estimate

# What rows call the pre-trained model.
LANGUAGE, IMAGES = "language", "images"

# Families of conditions whose kinds are other data, each with a mean of its own.
OTHER_DATA = ("shift", "outside")

Row = Mapping[str, Any]


class Sample(NamedTuple):
    """Values by seed and unit; samples whose units have the same name are paired: their units are the same texts."""

    values_SU: np.ndarray
    units: str


@dataclass(frozen=True)
class Grid:
    """`base` is the pre-trained model, LANGUAGE or IMAGES, `unit` what it is scored in: `bpc`, `perplexity` or `accuracy`.

    `results[stage, task]` (task None where a stage has none), `runs` and `units` list an entry per seed of each method;
    `pictures` are those of the first seed, of images alone. Rows of `tables` (history, routing, scores, layers, load, confusion)
    have method, seed and run_id.
    """

    methods: Sequence[str]
    seeds: Sequence[int]
    tasks: Sequence[str]
    base: str
    unit: str
    prepared: Mapping[str, Any]
    results: Mapping[tuple[str, str | None], Mapping[str, Sequence[Mapping[str, Any]]]]
    runs: Mapping[tuple[str, str | None], Mapping[str, Sequence[str]]]
    compute: Mapping[str, Mapping[str, Any]]
    compute_runs: Mapping[str, str]
    tables: Mapping[str, Sequence[Row]]
    units: Mapping[str, Sequence[Mapping[str, np.ndarray]]]
    pictures: Mapping[str, Pictures]
    resamples: int

    @property
    def models(self) -> tuple[str, ...]:
        return self.base, *self.tasks

    @cached_property
    def draws(self) -> Draws:
        """Segments and passages that were taken from one document are drawn together, in all samples."""
        first = self.units[self.methods[0]][0]
        groups = {name.removesuffix("/groups"): numbers_U for name, numbers_U in first.items() if name.endswith("/groups")}
        # Of passages their raw form is a shift.
        groups |= {f"{task}/raw": groups[task] for task in self.tasks if task in groups}
        return Draws(len(self.seeds), self.resamples, groups)

    def severity(self, rate: float) -> str:
        """How a severity is written: a share of what is changed in a text, a level of images."""
        return f"{rate:g}" if self.base == IMAGES else f"{100 * rate:g} %"

    @cached_property
    def _scores(self) -> dict[tuple[str, str, str], list[Row]]:
        found: dict[tuple[str, str, str], list[Row]] = {}
        for row in self.tables["scores"]:
            found.setdefault((row["method"], row["model"], row["mode"]), []).append(row)
        return found

    def check(self) -> None:
        """Raise Failure unless every method and seed was put under the same conditions, with the same units."""
        found: dict[str, dict[tuple[str, float], set[tuple[str, Any]]]] = {}
        for row in self.tables["scores"]:
            if row["mode"] == self.modes(row["method"])[1]:
                place = found.setdefault(row["model"], {}).setdefault((row["kind"], row["rate"]), set())
                place.add((row["method"], row["seed"]))
        cells = {(method, seed) for method in self.methods for seed in self.seeds}
        for model in self.models:
            for (kind, rate), there in found.get(model, {("clean", 0.0): set()}).items():
                for method, seed in sorted(cells - there):
                    raise Failure(f"scores of {method}, seed {seed}: {model} has no {kind} at {rate}; run `dvc repro`")
        for (method, model, mode), rows in self._scores.items():
            for seed in sorted(set(self.seeds) - {row["seed"] for row in rows if row["family"] == "clean"}):
                raise Failure(f"scores of {method}, seed {seed}: {model} has nothing clean in mode {mode}; run `dvc repro`")
        self._check_units()

    def _check_units(self) -> None:
        def groups(units: Mapping[str, np.ndarray]) -> set[str]:
            return {name for name in units if name.endswith("groups")}

        first, shapes = self.units[self.methods[0]][0], {}
        for method, seed in itertools.product(self.methods, self.seeds):
            units = self.units[method][self.seeds.index(seed)]
            for name in sorted(groups(units) ^ groups(first)):
                raise Failure(f"units of {method}, seed {seed}: {name} are not in all units, or in these alone; run `dvc repro`")
            for row in (row for row in self.tables["scores"] if (row["method"], row["seed"]) == (method, seed)):
                for what in ("score", "lost"):
                    name = f"{row['model']}/{row['mode']}/{row['kind']}/{row['rate']!r}/{what}"
                    shape = units[name].shape
                    if len(shape) != 1 or shape != shapes.setdefault(
                        units_of(row["model"], row["family"], row["kind"]), shape
                    ):
                        raise Failure(
                            f"units of {method}, seed {seed}: {name} is of shape {shape}, others are not; run `dvc repro`"
                        )

    def modes(self, method: str) -> tuple[str, str]:
        """The mode of pre-training and that of fine-tuning and inference; they may be the same."""
        modes = [mode for owner, model, mode in self._scores if (owner, model) == (method, self.base)]
        if not modes:
            raise Failure(f"scores of {method}: none of the pre-trained model; run `dvc repro`")
        return modes[0], modes[-1]

    def scores(self, method: str, model: str, family: str, mode: str | None = None) -> list[Row]:
        """Rows of scores.csv, of all seeds; in the mode of inference unless another is named."""
        rows = self._scores.get((method, model, mode or self.modes(method)[1]), [])
        return [row for row in rows if row["family"] == family]

    def conditions(self, method: str, model: str, family: str, mode: str | None = None) -> list[tuple[str, float]]:
        """Kinds and rates of a family, in the order they were run in."""
        return list(dict.fromkeys((row["kind"], row["rate"]) for row in self.scores(method, model, family, mode)))

    def sample(
        self,
        method: str,
        model: str,
        family: str,
        what: str,
        mode: str | None = None,
        only: tuple[str, float] | None = None,
    ) -> Sample | None:
        """Each unit's `score` or `lost`, mean over the conditions of a family or of one; None where there are none.

        Family `test` is the whole test split, clean: bits per token of each row of the text, right labels of each passage.
        """
        mode = mode or self.modes(method)[1]
        if family == "test":
            names = [f"{model}/{mode}/test" if model == self.base else f"{model}/test"]
        else:
            conditions = self.conditions(method, model, family, mode) if only is None else [only]
            names = [f"{model}/{mode}/{kind}/{rate!r}/{what}" for kind, rate in conditions]
        if not names:
            return None
        try:
            values_SU = np.array([np.mean([seed[name] for name in names], axis=0) for seed in self.units[method]])
        except (KeyError, ValueError) as error:
            raise Failure(f"units of {method}: not those of its scores ({error}); run `dvc repro`") from None
        return Sample(values_SU, units_of(model, family, "" if family == "test" else conditions[0][0]))

    def interval(self, sample: Sample | None) -> Estimate | None:
        """Mean over seeds and units with its 95 % bootstrap interval."""
        if sample is None:
            return None
        return estimate(float(sample.values_SU.mean()), self.draws.means(sample.values_SU, sample.units))

    def shift(self, method: str, model: str, kind: str, mode: str | None = None) -> Estimate | None:
        """What a shift costs; other texts than the clean ones, and other images, are drawn apart from these."""
        lost = self.sample(method, model, "shift", "lost", mode, (kind, 0.0))
        if model == LANGUAGE:
            clean = self.sample(method, model, "clean", "score", mode)
        elif self.base == IMAGES:
            clean = self.sample(method, model, "shift", "clean", mode, (kind, 0.0))
            clean = clean._replace(units=f"{clean.units}/clean")
        else:
            return self.interval(lost)
        scored = self.sample(method, model, "shift", "score", mode, (kind, 0.0))
        worse_R = self.draws.means(scored.values_SU, scored.units) - self.draws.means(clean.values_SU, clean.units)
        return estimate(float(lost.values_SU.mean()), worse_R if model == LANGUAGE else -worse_R)

    def outside(self, method: str, model: str, kind: str) -> Estimate:
        """How well the model tells clean images from others, both of them drawn.

        The mean of a pair's order is not one of pairs that can be drawn alone: what drawing clean images and others moves is
        added, which is its spread to the first order (DeLong et al. 1988).
        """
        others, clean = (self.sample(method, model, "outside", what, None, (kind, 0.0)) for what in ("score", "clean"))
        area = float(others.values_SU.mean())
        return estimate(area, self.draws.means(others.values_SU, others.units) + self.draws.means(clean.values_SU, model) - area)

    def by_seed(self, rows: Sequence[Row], method: str, name: str) -> np.ndarray | None:
        """Mean (S,) of a column over a method's rows of each seed; None where the column is empty or not there."""
        own = [row for row in rows if row["method"] == method and row.get(name) is not None]
        values = [[row[name] for row in own if row["seed"] == seed] for seed in self.seeds]
        return np.array([np.mean(seed) for seed in values]) if all(values) else None

    def layers(self, method: str, model: str, mode: str | None = None) -> list[Row]:
        """Rows of layers.csv, of all seeds; in the mode of inference unless another is named."""
        wanted = (method, model, mode or self.modes(method)[1])
        return [row for row in self.tables["layers"] if (row["method"], row["model"], row["mode"]) == wanted]


def units_of(model: str, family: str, kind: str) -> str:
    """A name for the units of a condition: clean and noisy ones are the same; attacks and shifts have their own."""
    own = f"/{kind}" if family in OTHER_DATA else {"attack": "/attack", "test": "/test"}.get(family, "")
    return model + own


def metric(entries: Sequence[Mapping[str, Any]], *keys: str) -> np.ndarray | None:
    """A nested metric of each seed (S,); None where it is missing."""
    values: list[Any] = list(entries)
    for key in keys:
        values = [value.get(key) if isinstance(value, Mapping) else None for value in values]
    return None if None in values else np.array(values, dtype=float)
