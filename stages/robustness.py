"""The pre-trained model and the fine-tuned ones under noise, attack and shift, and what the routing does meanwhile."""

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

from safetensors.numpy import save

from pipeline.data.batches import open_documents, open_tokens
from pipeline.data.images import Images, open_images, open_set
from pipeline.data.tasks import read_task
from pipeline.data.tokenizers import Tokenizer
from pipeline.evaluation.pictures import Pictures
from pipeline.evaluation.records import MEASURES, Record
from pipeline.evaluation.text_bench import Numbered, TextBench
from pipeline.files import output_folder, write_rows
from pipeline.moe.layer import Mode
from pipeline.progress import Progress
from pipeline.training import checkpoint
from pipeline.training.loop import Log
from pipeline.training.validation import RoutingTally
from stages import problems
from stages.paths import Cell, Paths, of_images

# A model's name, its mode, and the test of it.
Test = tuple[str, Mode, Callable[[Record, Progress], tuple[RoutingTally, list[dict[str, float]]]]]


def run(params: SimpleNamespace, paths: Paths, cell: Cell, log: Log) -> dict:
    """Writes scores.csv, layers.csv, load.csv and units.safetensors; returns means over corruptions and severities.

    `language` or `images` is the pre-trained model in its training mode and in that of inference, a task's name the model
    fine-tuned for it. Scores are bits per token (lower is better) and shares of right labels; degradation is positive when it
    hurts.
    """
    tests = list((_images if of_images(params.data.view) else _texts)(params, paths, cell))
    records, layers, load = [], [], []
    with Progress(f"robustness {cell.name}", total=len(tests) * _conditions(params), unit="test") as progress:
        for name, mode, test in tests:
            records.append(record := Record(name, mode))
            tally, collapsed = test(record, progress)
            layers += record.layers(tally, collapsed)
            load += record.load(tally)
    rows = [row for record in records for row in record.rows]
    for row in rows:
        if row["family"] in ("noise", "attack"):
            place = f"{row['model']}/{row['mode']}/{row['kind']}"
            # The x axis of an MLflow chart is the step: severity in thousandths.
            log({f"{place}/{name}": row[name] for name in MEASURES if row[name] is not None}, step=round(1000 * row["rate"]))
    with output_folder(paths.output("robustness", cell)) as folder:
        write_rows(folder / "scores.csv", rows)
        write_rows(folder / "layers.csv", layers)
        write_rows(folder / "load.csv", load)
        units = {key: values for record in records for key, values in record.units.items()}
        (folder / "units.safetensors").write_bytes(save(units))
        if of_images(params.data.view):
            _pictures(params, paths, cell).save(folder)
    metrics: dict = {}
    for record in records:
        metrics.setdefault(record.name["model"], {})[record.name["mode"]] = record.summary()
    return metrics


def _conditions(params: SimpleNamespace) -> int:
    given = params.robustness
    if of_images(params.data.view):
        return len(given.kinds) * len(given.severities) + len(given.attacks) * len(given.attack_eps)
    return len(given.kinds) * len(given.rates) + len(given.attack_rates)


def _texts(params: SimpleNamespace, paths: Paths, cell: Cell) -> Iterator[Test]:
    tokenizer = Tokenizer.load(paths.source / "tokenizer.json")

    def numbered(folder: Path, name: str) -> Numbered:
        return Numbered(open_tokens(folder / f"{name}.npy", tokenizer.size), open_documents(folder / f"{name}.documents.npy"))

    test, others = numbered(paths.source, "test"), paths.data / "shifts"
    names = [file.stem for file in sorted(others.iterdir())]
    shifts = {name: numbered(others, name) for name in names if name == "raw" or name in params.data.shifts}

    def bench(progress: Progress) -> TextBench:
        return TextBench(params.robustness, params.model.context, params.data.view, tokenizer, cell.seed, progress)

    model = checkpoint.load(paths.output("pretrain", cell), problems.language_model(params, cell, tokenizer))
    for mode in dict.fromkeys((model.train_mode, model.infer_mode)):
        yield "language", mode, lambda record, progress, mode=mode: bench(progress).language(model, mode, record, test, shifts)
    for name in params.data.tasks:
        task, folder = read_task(paths.task(name)), paths.output("finetune", cell._replace(task=name))
        tuned = checkpoint.load(folder, problems.classifier(params, cell, tokenizer, task))
        yield (
            name,
            tuned.backbone.infer_mode,
            lambda record, progress, tuned=tuned, task=task: bench(progress).classifier(tuned, record, task),
        )


def _images(params: SimpleNamespace, paths: Paths, cell: Cell) -> Iterator[Test]:
    # Loads torchvision, which texts need not wait for.
    from pipeline.evaluation.image_bench import ImageBench

    found = open_set(paths.source)
    others: dict[str, dict[str, Images]] = {
        "shifts": {name: open_images(paths.data / "shifts" / name, len(found.classes)) for name in params.data.shifts},
        "outside": {name: open_images(paths.data / "outside" / name) for name in params.data.outside},
    }
    model = checkpoint.load(paths.output("pretrain", cell), problems.image_classifier(params, cell, found))

    def bench(progress: Progress) -> ImageBench:
        return ImageBench(params.robustness, cell.seed, progress)

    for mode in dict.fromkeys((model.train_mode, model.infer_mode)):
        yield (
            "images",
            mode,
            lambda record, progress, mode=mode: bench(progress).test(model, mode, record, found.splits["test"], **others),
        )
    for name in params.data.tasks:
        task, folder = open_set(paths.task(name)), paths.output("finetune", cell._replace(task=name))
        tuned = checkpoint.load(folder, problems.image_classifier(params, cell, task))
        yield (
            name,
            tuned.infer_mode,
            lambda record, progress, tuned=tuned, task=task: bench(progress).test(
                tuned, tuned.infer_mode, record, task.splits["test"]
            ),
        )


def _pictures(params: SimpleNamespace, paths: Paths, cell: Cell) -> Pictures:
    from pipeline.evaluation.image_bench import pictures

    found = open_set(paths.source)
    model = checkpoint.load(paths.output("pretrain", cell), problems.image_classifier(params, cell, found))
    return pictures(model, model.infer_mode, found.splits["test"], params.robustness, cell.seed)
