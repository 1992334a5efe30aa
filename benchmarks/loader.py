"""Is assembling batches the bottleneck? Time of a batch against that of the training step that reads it.

    python -m benchmarks.loader

On made-up tokens and images of the sizes of the default experiment, vision/digits and vision/cifar10, timed in turns; the table
goes to the terminal, the numbers to benchmarks/results/loader.json.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.train import language, load, steps_of
from pipeline.data.batches import token_batch
from pipeline.data.images import Images, image_batch
from pipeline.evaluation.compute import interval, measure
from pipeline.files import write_json
from pipeline.models.build import Spec
from pipeline.training.problems import Pictures
from pipeline.training.seeding import seed_everything

RESULTS = Path(__file__).parent / "results"
# Images of a training split, channels and classes of what a preset reads.
SETS = {"vision/digits": (1221, 1, 10), "vision/cifar10": (42_500, 3, 10)}


def works(names: Sequence[str]) -> Iterator[tuple[str, Callable[[], Any], Callable[[], Any]]]:
    """Name, one batch, and one step of pre-training, batch included."""
    seed_everything(0, "benchmark")
    rng = np.random.default_rng(0)
    if "text" in names:
        params, steps = load(Path("params.yaml")), count(1)
        problem = language(params, "vqmoe")
        tokens, given = problem.tokens["train"], params.pretrain
        step = steps_of(problem, problem.fresh(), given)
        yield "text", lambda: token_batch(tokens, given.batch, params.model.context, 0, next(steps)), step
    for preset, (size, channels, classes) in SETS.items():
        if preset in names:
            yield _images(preset, size, channels, classes, rng)


def _images(preset: str, size: int, channels: int, classes: int, rng: np.random.Generator) -> tuple[str, Any, Any]:
    params = load(Path(f"presets/{preset}.yaml"))
    given, side = params.pretrain, params.prepare.size
    pixels = rng.integers(0, 256, (size, channels, side, side), dtype=np.uint8)
    images = Images(pixels, rng.integers(0, classes, size))
    spec = Spec(
        kind="image-classifier",
        method="vqmoe",
        settings=params.methods["vqmoe"],
        model=params.model,
        channels=channels,
        size=side,
        labels=tuple(map(str, range(classes))),
    )
    steps = count(1)

    def batch() -> object:
        return image_batch(images, given.batch, 0, next(steps), given.pad, given.flip)

    problem = Pictures(spec, {"train": images}, given, 0)
    return preset, batch, steps_of(problem, problem.fresh(), given)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", help="which: text, vision/digits, vision/cifar10 (default: all)")
    parser.add_argument("--repeats", type=int, default=15, help="timed rounds, at least 6 (default: 15)")
    parser.add_argument("--out", type=Path, default=RESULTS / "loader.json", help="where the numbers go")
    arguments = parser.parse_args()
    found = {}
    for name, batch, step in works(arguments.names or ["text", *SETS]):
        measured = measure({"batch": batch, "step": step}, arguments.repeats)
        ratio = interval(measured["step"].seconds_R / measured["batch"].seconds_R)
        found[name] = {"batch_ms": 1e3 * measured["batch"].seconds.median, "step_ms": 1e3 * measured["step"].seconds.median}
        found[name] |= {"steps_per_batch": ratio.median, "low": ratio.low, "high": ratio.high}
    print(f"{'':16} {'batch ms':>9} {'step ms':>9} {'step / batch [95 % interval]':>30}")
    for name, row in found.items():
        times = f"{row['steps_per_batch']:.0f} [{row['low']:.0f}, {row['high']:.0f}]"
        print(f"{name:16} {row['batch_ms']:9.2f} {row['step_ms']:9.1f} {times:>30}")
    write_json(arguments.out, found)


if __name__ == "__main__":
    main()
