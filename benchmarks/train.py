"""What routing costs of a whole training step: tokens per second of each method against a dense model of the same active FLOPs.

    python -m benchmarks.train
    python -m benchmarks.train --profile vqmoe
    python -m benchmarks.train --params presets/paper/enwik8-transformer.yaml -S machine.device=cuda -S machine.precision=bf16

Steps of pre-training, batch and optimizer included, on made-up tokens, timed in turns; `smoe, mask loop` is smoe whose experts
run one after another on the rows that a boolean mask finds. With --profile, where the time of one method's step goes. The table
goes to the terminal, the numbers to benchmarks/results/train.json.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.layer import MaskLoop
from pipeline import config
from pipeline.config import Params, Training
from pipeline.data.tokenizers import Tokenizer
from pipeline.evaluation.compute import Work, interval, measure
from pipeline.files import write_json
from pipeline.models.build import Spec
from pipeline.moe.layer import SETTINGS
from pipeline.moe.routers.base import LayerOutput, Sizes
from pipeline.training.machine import at_work
from pipeline.training.optim import adam
from pipeline.training.problems import Language, Problem
from pipeline.training.seeding import seed_everything
from stages.compute import training_step

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
LOOP = "smoe, mask loop"
METHODS = ("dense", "smoe", "xmoe", "vqmoe", "vqmoe_released", LOOP)
TOKENS = 2_000_000


def language(params: Params, method: str, vocabulary: int = 257) -> Language:
    """Random tokens, frequent and rare ones as words are (Zipf), to be predicted by a method's model."""
    seed_everything(0, "benchmark")
    settings, given = params.method(method), params.pretrain
    spec = Spec(kind="language-model", method=method, settings=settings, model=params.model, vocabulary=vocabulary)
    shares = 1 / np.arange(1, vocabulary)
    drawn = np.random.default_rng(0).choice(vocabulary - 1, TOKENS, p=shares / shares.sum())
    tokens = {"train": drawn.astype(np.uint32)}
    tokenizer = Tokenizer.make("bytes", [], 0)
    return Language(spec, tokenizer, tokens, given.batch, given.validate_tokens, 0, device=params.machine.device)


def step(params: Params, name: str, vocabulary: int = 257) -> Work:
    """One step of pre-training per call, on random tokens."""
    problem = language(params, name.partition(",")[0], vocabulary)
    model = problem.fresh()
    if name == LOOP:
        for block in model.blocks:
            block.moe = _Loop(params).to(params.machine.device)
    return steps_of(problem, model, params.pretrain)


def steps_of(problem: Problem, model: nn.Module, given: Training) -> Work:
    """One step of pre-training a model per call."""
    optimizer = adam(model, given.learning_rate, given.beta2, given.weight_decay)
    return training_step(model, optimizer, problem.objective(model, model.train_mode), given)


class _Loop(nn.Module):
    """A mixture layer around the loop."""

    modes = ("router",)

    def __init__(self, params: Params) -> None:
        super().__init__()
        model = params.model
        self.loop = MaskLoop(Sizes(model.width, model.experts, model.expert_width, 0, 0.0))

    def forward(self, x_ND: Tensor, mode: str, id_N: Tensor | None = None, length: int | None = None) -> LayerOutput:
        return LayerOutput(self.loop(x_ND), {}, x_ND.new_zeros(len(x_ND), 1, dtype=torch.long), None)


def load(file: Path, overrides: Sequence[str] = (), method: str | None = None) -> Params:
    return config.load(ROOT / file, SETTINGS, tuple(overrides), method)


def profile(work: Work, steps: int = 5) -> list[tuple[str, float]]:
    """Share of the time of each operation of torch, those above 1 %, the longest first."""
    work()
    with torch.profiler.profile() as profiler:
        for _ in range(steps):
            work()
    on_gpu = torch.cuda.is_initialized()
    times = {
        event.key: event.self_device_time_total if on_gpu else event.self_cpu_time_total for event in profiler.key_averages()
    }
    whole = sum(times.values())
    return [(name, time / whole) for name, time in sorted(times.items(), key=lambda one: -one[1]) if time > 0.01 * whole]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", help=f"which: {'; '.join(METHODS)} (default: all)")
    parser.add_argument("--params", type=Path, default=Path("params.yaml"), help="an experiment on text (default: params.yaml)")
    parser.add_argument("-S", dest="overrides", action="append", default=[], metavar="section.key=value", help="override a param")
    parser.add_argument("--repeats", type=int, default=15, help="timed rounds, at least 6 (default: 15)")
    parser.add_argument("--profile", metavar="NAME", help="only say where the time of this method's step goes")
    parser.add_argument("--out", type=Path, default=RESULTS / "train.json", help="where the numbers go")
    arguments = parser.parse_args()
    names = [arguments.profile] if arguments.profile else list(dict.fromkeys(("dense", *(arguments.names or METHODS))))
    found: dict[str, Any] = {}
    params = load(arguments.params, arguments.overrides, names[-1].partition(",")[0])
    with at_work(params.machine):
        if arguments.profile:
            for operation, share in profile(step(params, arguments.profile)):
                print(f"{100 * share:5.1f} %  {operation}")
            return
        works = {name: step(load(arguments.params, arguments.overrides, name.partition(",")[0]), name) for name in names}
        measured = measure(works, arguments.repeats)
    tokens = params.pretrain.batch * params.model.context
    print(f"{'':18} {'tokens/s':>9} {'of dense [95 % interval]':>26} {'memory / dense':>15}")
    for name, values in measured.items():
        ratio = interval(measured["dense"].seconds_R / values.seconds_R)
        memory = values.peak_memory_mib / measured["dense"].peak_memory_mib
        found[name] = {"tokens_per_second": tokens / values.seconds.median, "memory": memory} | ratio._asdict()
        shown = f"{ratio.median:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]"
        print(f"{name:18} {tokens / values.seconds.median:9.0f} {shown:>26} {memory:15.2f}")
    write_json(arguments.out, found)


if __name__ == "__main__":
    main()
