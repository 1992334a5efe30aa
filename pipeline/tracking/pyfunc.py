"""Logged models as MLflow's `python_function`: the files that say so, and what loads and asks such a model.

MLflow imports this module (`mlflow.pyfunc.load_model`, `mlflow models serve`). A model brings data and no code, and nothing is
unpickled.
"""

import base64
import json
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import Failure, UsageError

if TYPE_CHECKING:
    from mlflow.models import ModelSignature
    from pandas import DataFrame

    from pipeline.serving.served import Served

# What a kind of model may be given, for a start; an image is a file in base64.
EXAMPLES = {"language-model": ["we the people "], "classifier": ["Gold was found in California."], "image-classifier": None}
# What a language model can be told: type, and what holds where a request says nothing, as with `vqmoe generate`.
PARAMS = {"length": ("long", 400), "temperature": ("double", 0.8), "top_p": ("double", 1.0), "seed": ("long", 0)}
# What computes, of the versions that a run records.
PACKAGES = ("mlflow", "numpy", "pillow", "tokenizers", "torch", "torchvision")


def describe(folder: Path, model_id: str, tags: Mapping[str, str]) -> None:
    """Write MLmodel, requirements.txt and an example into a model's folder; `tags` are those of the run that made it.

    A folder that holds no model of this version is left as it is.
    """
    from mlflow.models import Model

    kind = None
    with suppress(OSError, ValueError, AttributeError):
        kind = json.loads((folder / "model.json").read_text(encoding="utf-8")).get("kind")
    if kind not in EXAMPLES:
        return
    model = Model(model_id=model_id, signature=signature(kind))
    model.add_flavor("python_function", loader_module=__name__, python_version=tags.get("vqmoe.version.python"))
    if EXAMPLES[kind]:
        model.saved_input_example_info = {"artifact_path": "input_example.json", "type": "json_object"}
        (folder / "input_example.json").write_text(json.dumps(EXAMPLES[kind]), encoding="utf-8")
    # Not as a requirement: an index may have something else by this name.
    own = f"# vqmoe {version('vqmoe')}, from its repository (commit {tags.get('mlflow.source.git.commit', 'unknown')})"
    needed = [f"{name}=={tags[tag]}" for name in PACKAGES if (tag := f"vqmoe.version.{name}") in tags]
    (folder / "requirements.txt").write_text("\n".join([own, *needed, ""]), encoding="utf-8")
    model.save(str(folder / "MLmodel"))


def signature(kind: str) -> "ModelSignature":
    """What a model of a kind is given (texts), gives, and can be told."""
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema
    from mlflow.types.schema import Map

    texts = Schema([ColSpec("string")])
    if kind == "language-model":
        return ModelSignature(texts, texts, ParamSchema([ParamSpec(name, *told) for name, told in PARAMS.items()]))
    return ModelSignature(texts, Schema([ColSpec("string", "label"), ColSpec(Map("double"), "probabilities")]))


class Asked:
    """A model as MLflow asks it."""

    def __init__(self, model: "Served") -> None:
        self._model = model

    def predict(self, data: "DataFrame", params: Mapping[str, Any] | None = None) -> list[Any]:
        """What a prompt in each row goes on with; or the label of each text or image, and the probabilities of all labels."""
        from mlflow.exceptions import MlflowException

        try:
            return self._answers(_texts(data.iloc[:, 0]), params)
        except (UsageError, Failure) as error:
            raise MlflowException.invalid_parameter_value(str(error)) from None

    def _answers(self, given: list[str], params: Mapping[str, Any] | None) -> list[Any]:
        from pipeline.serving import ImageClassifier, LanguageModel, Sampling

        model = self._model
        if isinstance(model, LanguageModel):
            length, sampling, seed = params["length"], Sampling(params["temperature"], params["top_p"]), params["seed"]
            return ["".join(model.generate(prompt, length, sampling, seed)) for prompt in given]
        if isinstance(model, ImageClassifier):
            with tempfile.TemporaryDirectory() as folder:
                share_PL = model.classify(_images(given, Path(folder)))
        else:
            share_PL = model.classify(given)
        labels = model.spec.labels
        return [
            {"label": labels[share_L.argmax()], "probabilities": dict(zip(labels, share_L.tolist(), strict=True))}
            for share_L in share_PL
        ]


def _texts(column: Iterable[Any]) -> list[str]:
    given = list(column)
    for row, one in enumerate(given):
        if not isinstance(one, str):
            raise UsageError(f"row {row} is {type(one).__name__}: give a list of texts, or of images as base64")
    return given


def _images(given: Sequence[str], folder: Path) -> list[Path]:
    """Files out of their base64."""
    files = [folder / f"row {row}" for row in range(len(given))]
    for file, one in zip(files, given, strict=True):
        try:
            file.write_bytes(base64.b64decode(one, validate=True))
        except ValueError as error:
            raise UsageError(f"{file.name}: no base64 ({error}); give the file of an image in base64") from None
    return files


def _load_pyfunc(folder: str) -> Asked:
    """What MLflow calls."""
    from pipeline.serving import load

    return Asked(load(Path(folder)))
