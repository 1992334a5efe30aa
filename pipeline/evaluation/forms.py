"""What the report needs of the files that stages leave: metrics, columns, arrays. Files of another form are refused as read."""

import reprlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired

from pydantic import Field, FiniteFloat, TypeAdapter, ValidationError
from typing_extensions import TypedDict  # pydantic takes typing's own from Python 3.12 on

from pipeline.errors import Failure
from pipeline.evaluation.grid import IMAGES, OTHER_DATA, Row

Family = Literal["clean", "noise", "attack", "shift", "outside"]
# Of a column.
Texts, Gaps = list[str], list[FiniteFloat | None]
Values = Annotated[list[FiniteFloat], Field(min_length=1)]


class Counts(TypedDict):
    train: int
    valid: int
    test: int


class Compressed(TypedDict):
    gzip: FiniteFloat
    bz2: FiniteFloat
    xz: FiniteFloat
    unigram: FiniteFloat


class Labels(TypedDict):
    accuracy: FiniteFloat
    macro_f1: FiniteFloat


class Reference(Labels):
    majority: FiniteFloat


class Tuned(TypedDict):
    test: Labels
    scratch: NotRequired[Labels]


class Routing(TypedDict):
    code_error: NotRequired[FiniteFloat]


class Timed(TypedDict):
    tokens_per_second: FiniteFloat
    low: FiniteFloat
    high: FiniteFloat
    flops_per_token: FiniteFloat
    peak_memory_mib: FiniteFloat | None


class Saved(TypedDict):
    seconds: FiniteFloat
    low: FiniteFloat
    high: FiniteFloat


SCORES = {
    **dict.fromkeys(("model", "mode", "kind"), Texts),
    "family": list[Family],
    **dict.fromkeys(("rate", "score", "degradation"), Values),
    **dict.fromkeys(("consistency", "kappa", "ece", "flips"), Gaps),
}
# Of the other columns a method has none for what its layers do not have.
LAYERS = {"model": Texts, "mode": Texts, "layer": Values, "consistency": Gaps, "kappa": Gaps}
LOAD = {**dict.fromkeys(("model", "mode", "what"), Texts), **dict.fromkeys(("layer", "index", "share"), Values)}
ROUTING = {
    **dict.fromkeys(("step", "layer"), Values),
    **dict.fromkeys(("imbalance", "entropy", "variation", "unused", "margin"), Gaps),
    **dict.fromkeys(("fluctuation", "utilisation", "perplexity"), Gaps),
}


def history(unit: str) -> dict[str, Any]:
    return {"step": Values, f"valid/{unit}": Values}


def prepared(base: str, unit: str, tasks: Sequence[str]) -> dict[str, Any]:
    """Metrics of `prepare`."""
    models = [base, *tasks] if base == IMAGES else tasks
    references = {"classifier": str, "tasks": dict.fromkeys(models, Reference)}
    found = {"examples": dict.fromkeys(models, Counts), "references": references}
    if base == IMAGES:
        return found | {"classes": {base: list[str]}}
    references[{"bpc": "bits_per_character"}.get(unit, unit)] = Compressed
    return found | {"tokens": Counts}


def result(stage: str, unit: str) -> dict[str, Any] | type:
    """Metrics of a stage of the grid."""
    scored = {unit: FiniteFloat}
    return {
        "pretrain": {"test": scored, "routing": Routing},
        "warmup": {"before": scored, "after": scored},
        "finetune": Tuned,
        "robustness": {},
    }[stage]


def compute(modes: Iterable[str]) -> dict[str, Any]:
    """Metrics of `compute`, of a method's modes of pre-training and inference."""
    modes = list(dict.fromkeys(modes))
    counted, phases = dict.fromkeys(modes, FiniteFloat), ("train", "finetune", "infer")
    found = {"parameters": {"total": FiniteFloat, "active": counted}, "flops_per_token": counted}
    found |= dict.fromkeys(phases, dict.fromkeys(modes, Timed))
    return found | ({"saving": dict.fromkeys(phases, Saved)} if len(modes) > 1 else {})


def units(base: str, scores: Sequence[Row]) -> list[str]:
    """Arrays of `robustness` for the rows of its scores."""
    return [
        f"{row['model']}/{row['mode']}/{row['kind']}/{row['rate']!r}/{what}"
        for row in scores
        for what in ("score", "lost", *(("clean",) if base == IMAGES and row["family"] in OTHER_DATA else ()))
    ]


def check(path: Path, found: Any, form: Mapping[str, Any]) -> None:
    """Raise Failure, which names file and key, unless `found` has all that a form has; it may have more."""
    try:
        TypeAdapter(_typed(form)).validate_python(found, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        if first["type"] == "missing":
            raise Failure(f"{path}: has no {place}; run `dvc repro`") from None
        said = first["msg"][0].lower() + first["msg"][1:]
        raise Failure(f"{path}: {place} is {reprlib.repr(first['input'])}: {said}; run `dvc repro`") from None


def _typed(form: Any) -> Any:
    return TypedDict("Form", {key: _typed(value) for key, value in form.items()}) if isinstance(form, Mapping) else form
