"""How cost grows with experts at the same active FLOPs, context at the same tokens, codes, vocabulary, size of a corpus.

    python -m benchmarks.growth experts context codes vocabulary corpus

Time of a training step, or of `prepare`, against that of the smallest, measured in turns. The tables go to the terminal, the
numbers to benchmarks/results/growth.json.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.train import language, load, step
from pipeline.config import Params
from pipeline.evaluation.compute import Work, interval, measure
from pipeline.files import write_json

RESULTS = Path(__file__).parent / "results"
TEXT = Path("params.yaml")
WORDS = Path("presets/paper/wikitext-103-transformer.yaml")
ENTRIES = 267_735
MEGABYTES = (10, 30, 100)

PREPARE = """
import json, re, sys, time
from pathlib import Path
from pipeline import config
from pipeline.moe.layer import SETTINGS
from stages import prepare
from stages.paths import SECTIONS, Paths
file, task, out = map(Path, sys.argv[1:4])
given = (f"data.corpus={file}", f"data.tasks={{small: {task}}}", "data.shifts={}", "robustness.kinds=[word]", *sys.argv[4:])
params = config.load(Path("params.yaml"), SETTINGS, given)
start = time.perf_counter()
prepare.run(params.select(SECTIONS["prepare"]), Paths(Path.cwd(), out))
seconds = time.perf_counter() - start
# The usage that the system tells of a process begins with that of the one which started it; this does not.
highest = re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())
print(json.dumps({"seconds": seconds, "mib": int(highest[1]) / 1024}))
"""


def experts(repeats: int) -> dict[str, Any]:
    """From 8 to 128 experts, of which a token meets as many."""
    found = {}
    for method in ("smoe", "vqmoe"):
        works = {
            f"{method}, {count} experts": step(
                load(TEXT, (f"model.experts={count}", f"methods.vqmoe.codes={count}"), method), method
            )
            for count in (8, 16, 32, 64, 128)
        }
        found |= _ratios(works, repeats)
    return found


def context(repeats: int) -> dict[str, Any]:
    """Sequences of 128 to 2,048 tokens, as many tokens per step."""
    tokens = 4096
    return _ratios(
        {
            f"vqmoe, context {length}": step(
                load(
                    TEXT,
                    (f"model.context={length}", f"model.evaluate_context={length}", f"pretrain.batch={tokens // length}"),
                    "vqmoe",
                ),
                "vqmoe",
            )
            for length in (128, 256, 512, 1024, 2048)
        },
        repeats,
    )


def codes(repeats: int) -> dict[str, Any]:
    """Codebooks of 16 to 4,096 codes over 16 experts."""
    return _ratios(
        {
            f"vqmoe, {count} codes": step(load(TEXT, ("model.experts=16", f"methods.vqmoe.codes={count}"), "vqmoe"), "vqmoe")
            for count in (16, 64, 256, 1024, 4096)
        },
        repeats,
    )


def vocabulary(repeats: int) -> dict[str, Any]:
    """Adaptive against full softmax over the words of WikiText-103, in a step and alone: time, and memory beyond the weights."""
    given = ("pretrain.batch=4", "model.layers=2", "machine.precision=fp32", "machine.device=cpu")
    kinds = {"full": load(WORDS, ("model.cutoffs=[]", *given), "smoe"), "adaptive": load(WORDS, given, "smoe")}
    found = _ratios({f"step, {kind} softmax": step(params, "smoe", ENTRIES + 1) for kind, params in kinds.items()}, repeats)
    return found | _ratios({f"{kind} softmax alone": _softmax(params) for kind, params in kinds.items()}, repeats)


def _softmax(params: Params) -> Work:
    """Scores of the next tokens of a batch, and their gradients."""
    problem = language(params, "smoe", ENTRIES + 1)
    model = problem.fresh()
    state_ND = torch.randn(params.pretrain.batch * params.model.context, model.width, requires_grad=True)
    target_N = torch.from_numpy(problem.tokens["train"][: len(state_ND)].astype(np.int64))

    def run() -> None:
        model.zero_grad()
        model.nats(state_ND, target_N).mean().backward()

    return run


def corpus(_: int) -> dict[str, Any]:
    """`prepare` of one file of made-up words: seconds, and most memory of its process."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        task = Path(folder) / "task.csv"
        rows = [f"word {label},{label},{split}" for split in ("train", "valid", "test") for label in ("one", "other") * 4]
        task.write_text("\n".join(["text,label,split", *rows]))
        for megabytes in MEGABYTES:
            file = Path(folder) / f"{megabytes}.txt"
            write_words(file, megabytes)
            for kind, more in {"bytes": (), "words": ("data.tokenizer=words", "data.view=bytes")}.items():
                command = [sys.executable, "-c", PREPARE, str(file), str(task), f"{folder}/out", *more]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                found[f"{megabytes} MB as {kind}"] = json.loads(done.stdout.splitlines()[-1])
    for name, row in found.items():
        print(f"{name:22} {row['seconds']:9.1f} s {row['mib']:9.0f} MiB")
    return found


def write_words(file: Path, megabytes: int) -> None:
    """Words of letters, frequent and rare as in a language (Zipf), lines of about ten."""
    rng = np.random.default_rng(0)
    letters = np.frombuffer(b"etaoinshrdlucmfwypvbgkjqxz", dtype=np.uint8)
    words = [bytes(rng.choice(letters, rng.integers(2, 11))).decode() for _ in range(200_000)]
    with open(file, "w") as text:
        while text.tell() < megabytes * 1_000_000:
            chosen = np.minimum(rng.zipf(1.3, 100_000) - 1, len(words) - 1)
            line = [words[place] for place in chosen]
            text.writelines(" ".join(line[start : start + 10]) + ".\n" for start in range(0, len(line), 10))


def _ratios(works: Mapping[str, Work], repeats: int) -> dict[str, Any]:
    measured = measure(works, repeats)
    first, *_ = measured.values()
    found = {}
    for name, values in measured.items():
        ratio = interval(values.seconds_R / first.seconds_R)
        found[name] = ratio._asdict() | {"ms": 1e3 * values.seconds.median, "mib": values.peak_memory_mib}
        shown = f"{ratio.median:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]"
        print(f"{name:22} {1e3 * values.seconds.median:9.1f} ms {shown:>20} {values.peak_memory_mib or math.nan:9.0f} MiB")
    return found


GROWTHS = {growth.__name__: growth for growth in (experts, context, codes, vocabulary, corpus)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", help=f"which: {', '.join(GROWTHS)} (default: all)")
    parser.add_argument("--repeats", type=int, default=9, help="timed rounds, at least 6 (default: 9)")
    parser.add_argument("--out", type=Path, default=RESULTS / "growth.json", help="where the numbers go")
    arguments = parser.parse_args()
    found = {}
    for name in arguments.names or GROWTHS:
        print(f"{name}: {GROWTHS[name].__doc__}")
        found[name] = GROWTHS[name](arguments.repeats)
    write_json(arguments.out, found)


if __name__ == "__main__":
    main()
