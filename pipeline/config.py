"""params.yaml as frozen, typed sections. An unknown key, a wrong type or an impossible value is one clear line.

The sections of `methods` are typed by the methods themselves (`pipeline.moe`), whose table the caller hands in:
this file knows no method, and a new method does not touch it.
"""

import hashlib
import json
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, Literal, Protocol, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from ruamel.yaml import YAML
from ruamel.yaml.error import ReusedAnchorWarning, YAMLError

from pipeline.errors import UsageError, nearest

Count = Annotated[int, Field(gt=0)]
Length = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, lt=1)]
Rate = Annotated[float, Field(gt=0, le=1)]
Name = Annotated[str, Field(min_length=1)]
# A name that a folder of results and a stage of DVC can have.
Key = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]
AsTuple = BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)


# torch's grouped matrix product asks for rows of whole 16 bytes, which are 8 numbers of the smaller types.
GROUPED = 8

Corruption = Literal["swap", "delete", "insert", "replace", "keyboard", "word", "case", "whitespace"]

# How data is seen; it tells text from images.
TextView = Literal["text27", "bytes"]
ImageView = Literal["grey", "rgb"]

ImageCorruption = Literal[
    "gaussian_noise", "shot_noise", "impulse_noise", "gaussian_blur", "motion_blur", "brightness", "contrast", "pixelate", "jpeg"
]
ImageAttack = Literal["fgsm", "pgd"]

# What results call the pre-trained model, conditions and families of them.
_CONDITIONS = {*get_args(Corruption), *get_args(ImageCorruption), *get_args(ImageAttack), "greedy", "raw"}
RESERVED = {"language", "images", "clean", "noise", "attack", "shift", "outside", *_CONDITIONS}


# Noise that tokens other than single characters cannot have.
_OF_CHARACTERS = ("keyboard", "case", "whitespace")


def _distinct(value: tuple[Any, ...]) -> tuple[Any, ...]:
    if len(set(value)) != len(value):
        raise ValueError("lists an entry twice; name each once")
    return value


def _rising(value: tuple[float, ...]) -> tuple[float, ...]:
    if list(value) != sorted(set(value)):
        raise ValueError("must rise from entry to entry")
    return value


Distinct = AfterValidator(_distinct)
Rising = AfterValidator(_rising)


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class MethodSettings(Protocol):
    """What a method's settings class offers beside its fields.

    `causal`: what a token gets depends on no other; `needs_ids`: tokens are routed by their ids.
    """

    causal: bool
    needs_ids: bool

    def check(self, experts: int) -> None:
        """Raise ValueError("<key> is <value>: <what is allowed>") if the settings do not fit `experts` experts."""


class Grid(Section):
    methods: Annotated[tuple[str, ...], AsTuple, Field(min_length=1), Distinct]
    seeds: Annotated[tuple[Annotated[int, Field(ge=0, lt=2**31)], ...], AsTuple, Field(min_length=1), Distinct]


class Data(Section):
    """What both kinds of data have in common; `view` tells them apart."""

    corpus: Name
    tasks: Annotated[dict[Key, Name], Field(min_length=1)]
    shifts: dict[Key, Name]

    @field_validator("tasks", "shifts", "outside", check_fields=False)
    @classmethod
    def _no_reserved_name(cls, value: dict[str, str]) -> dict[str, str]:
        for name in RESERVED & value.keys():
            raise ValueError(f"has the name '{name}', which results use for something else; choose another")
        return value


class TextData(Data):
    view: TextView
    tokenizer: Literal["bytes", "characters", "words", "bpe"]
    vocabulary: Annotated[int, Field(ge=0)]

    @model_validator(mode="after")
    def _tokenizer_fits(self) -> "TextData":
        if self.tokenizer == "characters" and self.view != "text27":
            raise ValueError(f"tokenizer is 'characters': view is '{self.view}', must be text27")
        if self.tokenizer == "bpe" and self.vocabulary < 256:
            raise ValueError(f"vocabulary is {self.vocabulary}: tokenizer bpe needs at least 256, an entry for each byte")
        if self.tokenizer == "words" and self.vocabulary in (1, 2):
            raise ValueError(f"vocabulary is {self.vocabulary}: <eos> and <unk> take two; give words more, or 0 for all of them")
        return self


class ImageData(Data):
    view: ImageView
    outside: dict[Key, Name]

    @model_validator(mode="after")
    def _distinct_names(self) -> "ImageData":
        if both := sorted(self.shifts.keys() & self.outside.keys()):
            raise ValueError(f"outside: has the name '{both[0]}', which shifts has too; choose another")
        return self


class TextPrepare(Section):
    passage: Annotated[int, Field(ge=16)]
    vocabulary: Annotated[int, Field(ge=100)]


class ImagePrepare(Section):
    size: Annotated[int, Field(ge=8)]
    valid: Annotated[float, Field(gt=0, lt=1)]
    broken: Literal["refuse", "skip"]


class Model(Section):
    """What both backbones have in common."""

    layers: Count
    width: Count
    heads: Count
    head_width: Count
    experts: Count
    expert_width: Count
    dropout: Share

    @model_validator(mode="after")
    def _grouped(self) -> "Model":
        for name in ("width", "expert_width"):
            if getattr(self, name) % GROUPED:
                raise ValueError(f"{name} is {getattr(self, name)}: must be a multiple of {GROUPED}, for grouped products")
        return self


class TextModel(Model):
    context: Annotated[int, Field(ge=8)]
    memory: Length
    evaluate_context: Count
    evaluate_memory: Length
    norm: Literal["pre", "post"]
    positions: Literal["rotary", "learned", "relative"]
    cutoffs: Annotated[tuple[Count, ...], AsTuple, Rising]

    @model_validator(mode="after")
    def _keys_agree(self) -> "TextModel":
        if self.positions == "rotary" and self.head_width % 2:
            raise ValueError(f"head_width is {self.head_width}: must be even for rotary positions")
        if self.positions != "relative":
            for key in ("memory", "evaluate_memory"):
                if getattr(self, key):
                    raise ValueError(f"{key} is {getattr(self, key)}: must be 0 unless positions are relative")
            if self.evaluate_context > self.context:
                raise ValueError(
                    f"evaluate_context is {self.evaluate_context}: at most context ({self.context}) unless positions are relative"
                )
        if self.width < 4 ** len(self.cutoffs):
            raise ValueError(f"cutoffs lists {len(self.cutoffs)}: width must be at least {4 ** len(self.cutoffs)} for that many")
        return self


class VisionModel(Model):
    """A vision Transformer: its blocks `expert_blocks`, counted from 0, have experts, the others one dense feed-forward."""

    patch: Count
    expert_blocks: Annotated[tuple[Length, ...], AsTuple, Field(min_length=1), Rising]
    dense_width: Count
    shared_width: Length
    pooling: Literal["class", "mean"]

    @model_validator(mode="after")
    def _blocks_exist(self) -> "VisionModel":
        if self.expert_blocks[-1] >= self.layers:
            raise ValueError(f"expert_blocks has {self.expert_blocks[-1]}: must be below layers ({self.layers})")
        return self


class Training(Section):
    """What every training stage needs: a budget in steps, an optimizer and how often to validate."""

    steps: Count
    batch: Count
    learning_rate: Positive
    beta2: Annotated[float, Field(gt=0, lt=1)]
    ramp: Share
    clip: Positive
    weight_decay: Annotated[float, Field(ge=0)]
    validate_every: Count


class TextPretrain(Training):
    validate_tokens: Count


class TextWarmup(Training):
    validate_tokens: Count
    kmeans_tokens: Count


class TextFinetune(Training):
    crop: Count
    validate_passages: Count
    pooling: Literal["last", "mean"]
    head_dropout: Share
    scratch: bool


class ImageTraining(Training):
    """How training images vary and labels are softened; validation sees evenly spaced images as they are."""

    pad: Length
    flip: bool
    smoothing: Share
    validate_images: Count


class ImageWarmup(ImageTraining):
    kmeans_images: Count


class ImageFinetune(ImageTraining):
    scratch: bool


class TextRobustness(Section):
    kinds: Annotated[tuple[Corruption, ...], AsTuple, Field(min_length=1), Distinct]
    rates: Annotated[tuple[Rate, ...], AsTuple, Field(min_length=1), Rising]
    segments: Count
    passages: Count
    attack_rates: Annotated[tuple[Rate, ...], AsTuple, Field(min_length=1), Rising]
    attack_queries: Annotated[int, Field(ge=6)]
    attack_texts: Count


class ImageRobustness(Section):
    kinds: Annotated[tuple[ImageCorruption, ...], AsTuple, Field(min_length=1), Distinct]
    severities: Annotated[tuple[Annotated[int, Field(ge=1, le=5)], ...], AsTuple, Field(min_length=1), Rising]
    images: Count
    attacks: Annotated[tuple[ImageAttack, ...], AsTuple, Field(min_length=1), Distinct]
    attack_eps: Annotated[tuple[Annotated[float, Field(gt=0, le=255)], ...], AsTuple, Field(min_length=1), Rising]
    attack_steps: Count
    attack_images: Count


class Compute(Section):
    # Of fewer there is no 95 % interval of a median.
    repeats: Annotated[int, Field(ge=6)]


class Report(Section):
    dpi: Annotated[int, Field(ge=50, le=600)]
    resamples: Annotated[int, Field(ge=100)]


class Machine(Section):
    """Where models compute, and how exactly: both are part of what decides a result's bits."""

    device: Literal["cpu", "cuda"]
    precision: Literal["fp32", "bf16"]
    processes: Count

    @model_validator(mode="after")
    def _possible(self) -> "Machine":
        if self.device == "cpu" and self.precision == "bf16":
            raise ValueError("precision is bf16: needs machine.device cuda; a CPU is faster with fp32")
        return self


class Resume(Section):
    steps: Count
    seconds: Positive


class Tracking(Section):
    experiment: Annotated[str, Field(min_length=1, pattern=r"^[\w .-]+$")]


class Params(Section):
    """All of params.yaml; `TextParams` or `ImageParams`, by data.view."""

    grid: Grid
    data: Data
    prepare: Section
    model: Model
    methods: dict[str, Any]
    pretrain: Training
    warmup: Training
    finetune: Training
    robustness: Section
    compute: Compute
    report: Report
    machine: Machine
    resume: Resume
    tracking: Tracking

    @field_validator("methods")
    @classmethod
    def _typed_methods(cls, value: dict[str, Any], info: ValidationInfo) -> dict[str, MethodSettings]:
        known: Mapping[str, type[BaseModel]] = info.context["settings"]
        for name in value:
            if name not in known:
                raise ValueError(f"'{name}' is no method; there are: {', '.join(known)}{nearest(name, known)}")
        typed = {}
        for name, raw in value.items():
            try:
                typed[name] = known[name].model_validate(raw)
            except ValidationError as error:
                raise _Nested(name, error) from None
        return typed

    @model_validator(mode="after")
    def _processes_fit(self) -> "Params":
        for stage in ("pretrain", "warmup", "finetune"):
            if (batch := getattr(self, stage).batch) % self.machine.processes:
                raise ValueError(f"machine.processes is {self.machine.processes}: must divide {stage}.batch ({batch})")
        return self

    @model_validator(mode="after")
    def _methods_fit(self) -> "Params":
        for name in self.grid.methods:
            self.method(name)
        return self

    def method(self, name: str) -> Any:
        """The settings of one method; a name without a section, or a section that does not fit the model, is an error."""
        if name not in self.methods:
            raise UsageError(
                f"method '{name}' has no section under methods; there are: "
                f"{', '.join(self.methods)}{nearest(name, self.methods)}"
            )
        try:
            self.methods[name].check(self.model.experts)
        except ValueError as error:
            raise UsageError(f"in methods.{name}: {error}") from None
        return self.methods[name]

    def select(self, sections: Iterable[str], method: str | None = None) -> SimpleNamespace:
        """Only the named sections, or of one a key (`data.view`), and one method's settings as `.method`.

        A stage cannot read what it does not declare.
        """
        chosen = SimpleNamespace()
        for name in sections:
            section, _, key = name.partition(".")
            value = getattr(self, section)
            setattr(chosen, section, SimpleNamespace(**{key: getattr(value, key)}) if key else value)
        if method is not None:
            chosen.method = self.method(method)
        return chosen


class TextParams(Params):
    data: TextData
    prepare: TextPrepare
    model: TextModel
    pretrain: TextPretrain
    warmup: TextWarmup
    finetune: TextFinetune
    robustness: TextRobustness

    @model_validator(mode="after")
    def _sections_agree(self) -> "TextParams":
        for name in self.grid.methods:
            if not self.methods[name].causal:
                raise ValueError(
                    f"grid.methods has {name}: it looks at other tokens, those that are to be predicted among them, so it is for "
                    "images; drop it" + (", or set methods.vmoe.capacity: 0" if name == "vmoe" else "")
                )
        if self.finetune.crop > self.model.context:
            raise ValueError(f"finetune.crop is {self.finetune.crop}: at most model.context ({self.model.context})")
        for kind in self.robustness.kinds:
            if self.data.tokenizer in ("words", "bpe") and kind in _OF_CHARACTERS:
                raise ValueError(f"robustness.kinds has {kind}: impossible with data.tokenizer {self.data.tokenizer}; drop it")
            if kind == "case" and self.data.view == "text27":
                raise ValueError(
                    "robustness.kinds has case: data.view text27 has no capitals, a model of it never met one; drop it"
                )
        return self


class ImageParams(Params):
    data: ImageData
    prepare: ImagePrepare
    model: VisionModel
    pretrain: ImageTraining
    warmup: ImageWarmup
    finetune: ImageFinetune
    robustness: ImageRobustness

    @model_validator(mode="after")
    def _sections_agree(self) -> "ImageParams":
        for name in self.grid.methods:
            if self.methods[name].needs_ids:
                raise ValueError(f"grid.methods has {name}: it routes tokens by their ids, which patches do not have; drop it")
        if self.prepare.size % self.model.patch:
            raise ValueError(f"model.patch is {self.model.patch}: must divide prepare.size ({self.prepare.size})")
        return self


class _Nested(Exception):
    """A validation error inside methods.<name>, carried out of pydantic's own validation with its location."""

    def __init__(self, name: str, error: ValidationError) -> None:
        self.name, self.error = name, error


def load(path: Path, settings: Mapping[str, type[BaseModel]], overrides: Sequence[str] = (), method: str | None = None) -> Params:
    """Read and validate params.yaml.

    `settings` maps each method's name to the class of its settings; `overrides` are `section.key=value`, the value
    read as YAML. Numbers follow YAML 1.2, so `1e-4` and `0.0001` are the same number. With `method`, the grid has this one.
    Raises UsageError with one line that names the file or the override, the key, the value found and what is allowed.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UsageError(f"{path}: no such params file; name one with --params, or run inside the repository") from None
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not UTF-8 (byte {error.start}); save it as UTF-8 text") from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", ReusedAnchorWarning)
            raw = YAML(typ="safe").load(text)
    except _BAD_YAML as error:
        raise UsageError(f"{path}: not valid YAML{_problem(error)}") from None
    if not isinstance(raw, dict):
        raise UsageError(f"{path}: holds {type(raw).__name__}, expected sections ({', '.join(Params.model_fields)})")
    for override in overrides:
        _apply(raw, override)
    kind = _kind(path, raw)
    if method is not None and isinstance(raw.get("grid"), dict):
        raw["grid"]["methods"] = [method]
    try:
        return kind.model_validate(raw, context={"settings": settings})
    except ValidationError as error:
        raise UsageError(_line(error, (), kind, path, overrides)) from None
    except UsageError as error:  # of a method that the grid names
        raise UsageError(f"{path}: {error}") from None
    except _Nested as nested:
        raise UsageError(_line(nested.error, ("methods", nested.name), settings[nested.name], path, overrides)) from None


def _kind(path: Path, raw: dict[str, Any]) -> type[Params]:
    """Params of text or of images, as data.view says."""
    data, model = raw.get("data"), raw.get("model")
    if not isinstance(data, dict) or "view" not in data:
        return TextParams
    view = data["view"]
    if view not in (*get_args(TextView), *get_args(ImageView)):
        raise UsageError(
            f"{path}: data.view is {view!r}: expected {' or '.join(get_args(TextView))} (text), "
            f"{' or '.join(get_args(ImageView))} (images)"
        )
    kind = ImageParams if view in get_args(ImageView) else TextParams
    if isinstance(model, dict) and model and ("patch" in model) != (kind is ImageParams):
        begin = "vision/digits" if kind is ImageParams else "evidence/text"
        raise UsageError(
            f"{path}: data.view is {view!r}, but section model is that of another kind of data; begin with `vqmoe preset {begin}`"
        )
    return kind


def dump(params: Params) -> str:
    """Whole params as YAML that `load` reads back."""
    # JSON is YAML, and writes every number such that it is read back as the same.
    return json.dumps(plain(params), indent=2, ensure_ascii=False) + "\n"


def fingerprint(value: Any) -> str:
    """Sha256 of params (models, namespaces, plain values) as canonical JSON."""
    return hashlib.sha256(json.dumps(plain(value), sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def plain(value: Any) -> Any:
    """Params as plain dicts, lists and numbers."""
    if isinstance(value, BaseModel):
        return plain(value.model_dump())
    if isinstance(value, SimpleNamespace):
        return plain(vars(value))
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Params as one level of dotted keys: {"model.width": 128, ...}."""
    result: dict[str, Any] = {}
    for key, item in plain(value).items():
        if isinstance(item, dict):
            result |= flat(item, f"{prefix}{key}.")
        else:
            result[f"{prefix}{key}"] = item
    return result


def _apply(raw: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise UsageError(f"-S {override}: expected section.key=value, for example -S pretrain.steps=200")
    try:
        value = YAML(typ="safe").load(text)
    except _BAD_YAML:
        raise UsageError(f"-S {override}: '{text}' is not a YAML value") from None
    *sections, last = key.strip().split(".")
    part = raw
    for section in sections:
        if not isinstance(part.get(section), dict):
            known = [key for key, value in part.items() if isinstance(value, dict)]
            raise UsageError(f"-S {override}: there is no section '{section}'{nearest(section, known)}")
        part = part[section]
    part[last] = value


# What the parser raises; beside its own errors those of a value that is none of its kind, such as a date or `!!int ""`.
_BAD_YAML = (YAMLError, ReusedAnchorWarning, ValueError, LookupError, RecursionError)

_SECTION = "input should be a section of keys and values"
# Where pydantic speaks of Python's types, YAML's words.
_EXPECTED = {"tuple_type": "input should be a list, such as [a, b]", "model_type": _SECTION, "dict_type": _SECTION}


def _problem(error: Exception) -> str:
    """Where and what, out of the many lines of a YAML error."""
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None) or str(error).strip()
    return f"{f', line {mark.line + 1}' if mark else ''}: {problem.splitlines()[0]}"


def _line(error: ValidationError, above: tuple[str, ...], model: type[BaseModel], path: Path, overrides: Sequence[str]) -> str:
    """The first error of a validation, with the file or the override that it is in."""
    # A misspelt key is missing where it should be, too.
    first = min(error.errors(), key=lambda one: one["type"] != "extra_forbidden")
    where = ".".join(map(str, above + first["loc"]))
    given = [override for override in overrides if override.partition("=")[0].strip() == where]
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    return f"{f'-S {given[-1]}' if given else path}: {_told(first, where, model)}{more}"


def _told(first: Any, where: str, model: type[BaseModel]) -> str:
    """An error, with the nearest known key for a misspelt one."""
    if first["type"] == "extra_forbidden":
        known = _fields(model, first["loc"][:-1])
        return f"unknown key {where}{nearest(str(first['loc'][-1]), known)}; known there: {', '.join(known)}"
    if first["type"] == "missing":
        return f"{where} is missing; add it"
    if first["type"] == "value_error":
        reason = str(first["ctx"]["error"])
        return f"{where + ': ' if where else ''}{reason}"
    expected = _EXPECTED.get(first["type"], first["msg"][0].lower() + first["msg"][1:])
    if first["type"] == "literal_error":
        expected += nearest(str(first["input"]), re.findall("'(.*?)'", first["ctx"]["expected"]))
    return f"{where} is {first['input']!r}: {expected}"


def _fields(model: type[BaseModel], location: tuple[Any, ...]) -> list[str]:
    for part in location:
        model = model.model_fields[part].annotation  # type: ignore[assignment]
    return list(model.model_fields)

