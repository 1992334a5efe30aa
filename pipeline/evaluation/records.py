"""What a model did under each condition: rows for files, and the values of each unit behind them."""

from collections.abc import Iterable

import numpy as np

from pipeline.evaluation.grid import OTHER_DATA
from pipeline.evaluation.robustness import Effect
from pipeline.moe.layer import Mode
from pipeline.training.validation import RoutingTally

Row = dict[str, str | float | None]

FAMILIES = ("clean", "noise", "attack", "shift", "outside")
MEASURES = ("score", "degradation", "consistency", "kappa", "ece", "flips")


class Record:
    """Results of one model in one mode: rows of scores.csv and layers.csv, and the values of each text behind them."""

    def __init__(self, model: str, mode: Mode) -> None:
        self.name: Row = {"model": model, "mode": mode}
        self.rows: list[Row] = []
        self.units: dict[str, np.ndarray] = {}
        self._steady: dict[str, list[list[float | None]]] = {"consistency": [], "kappa": []}

    def add(self, family: str, kind: str, rate: float, effect: Effect) -> None:
        means = {"score": float(effect.score_S.mean()), "degradation": float(effect.lost_S.mean())}
        steady = {name: _mean(getattr(effect, name) or []) for name in self._steady}
        more = steady | {"ece": effect.ece, "flips": effect.flips}
        self.rows.append(self.name | {"family": family, "kind": kind, "rate": rate} | means | more)
        key = f"{self.name['model']}/{self.name['mode']}/{kind}/{rate!r}"
        self.units |= {f"{key}/score": effect.score_S, f"{key}/lost": effect.lost_S}
        if effect.clean_S is not None:
            self.units[f"{key}/clean"] = effect.clean_S
        for name, conditions in self._steady.items():
            if family == "noise" and getattr(effect, name) is not None:
                conditions.append(getattr(effect, name))

    def layers(self, tally: RoutingTally, collapsed: list[dict[str, float]]) -> list[Row]:
        """Routing of each layer: consistency over all noise, load, margin and codebook on clean text, collapse of its experts."""
        return [
            self.name
            | row
            | {name: _mean([found[layer] for found in conditions]) for name, conditions in self._steady.items()}
            | apart
            for layer, (row, apart) in enumerate(zip(tally.rows(), collapsed, strict=True))
        ]

    def load(self, tally: RoutingTally) -> list[Row]:
        """Share of each expert and code on clean text."""
        return [
            self.name | {"what": what, "layer": layer, "index": index, "share": share}
            for what, shares in (("expert", tally.expert_shares()), ("code", tally.code_shares()))
            for layer, values in zip(tally.blocks, shares, strict=False)
            for index, share in enumerate(values.tolist())
        ]

    def summary(self) -> dict[str, dict[str, float]]:
        """Mean of each measure over the conditions of a family; every kind of other data stands alone."""
        result = {}
        for family in FAMILIES:
            kinds = dict.fromkeys(row["kind"] for row in self.rows if row["family"] == family)
            for kind in kinds if family in OTHER_DATA else (None,):
                chosen = [row for row in self.rows if row["family"] == family and kind in (None, row["kind"])]
                means = {name: [row[name] for row in chosen if row[name] is not None] for name in MEASURES}
                result[kind or family] = {name: float(np.mean(values)) for name, values in means.items() if values}
        return {name: values for name, values in result.items() if values}


def _mean(values: Iterable[float | None]) -> float | None:
    """Of the values there are."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None
