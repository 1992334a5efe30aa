"""How long commands take before they do anything: help, a stage, `dvc repro` with nothing to do.

    python -m benchmarks.start

In a clone of this repository, after a tiny experiment on a few kilobytes of text has run there; beside them python alone, and
with torch. `stage` is a pre-training of one step. Processes are timed in turns; the table goes to the terminal, the numbers to
benchmarks/results/start.json.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from pipeline.evaluation.compute import Work, measure
from pipeline.files import write_json

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
# What makes the tiny experiment read little.
SMALL = {
    "  corpus: sotu ": "  corpus: small ",
    "    era: era ": "    era: small.csv ",
    "    austen: austen ": "    austen: small ",
}
REPRO = "dvc repro, unchanged"
COMMANDS = {
    "python": [sys.executable, "-c", "pass"],
    "python, import torch": [sys.executable, "-c", "import torch"],
    "vqmoe --help": ["vqmoe", "--help"],
    "stage": ["vqmoe", "pretrain", "-Spretrain.steps=1", "-Spretrain.validate_every=1"],
    REPRO: ["dvc", "repro"],
}


def works(folder: Path) -> dict[str, Work]:
    """Each command where an experiment has been run before; the stage in a copy, since it leaves other outputs."""
    whole, copy = folder / "whole", folder / "copy"

    def run(place: Path, *command: str) -> None:
        environment = os.environ | {"PYTHONPATH": str(place), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        environment.pop("MLFLOW_TRACKING_URI", None)
        subprocess.run(command, cwd=place, env=environment, check=True, capture_output=True)

    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(whole)], check=True)
    given = (whole / "presets/tiny.yaml").read_text()
    for there, small in SMALL.items():
        assert given.count(there) == 1, there
        given = given.replace(there, small)
    (whole / "params.yaml").write_text(given)
    (whole / "small").mkdir()
    for split in ("train", "valid", "test"):
        (whole / f"small/{split}.txt").write_text("a few words and the next\n" * 200)
    rows = [
        f"{f'words {label} and more ' * 10},{label},{split}" for split in ("train", "valid", "test") for label in ("one", "other")
    ]
    (whole / "small.csv").write_text("\n".join(["text,label,split", *rows]))
    run(whole, *COMMANDS[REPRO])
    shutil.copytree(whole, copy)
    return {
        name: lambda name=name, command=command: run(copy if name == "stage" else whole, *command)
        for name, command in COMMANDS.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=7, help="timed rounds, at least 6 (default: 7)")
    parser.add_argument("--out", type=Path, default=RESULTS / "start.json", help="where the numbers go")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="vqmoe-") as folder:
        measured = measure(works(Path(folder)), arguments.repeats)
    found = {name: values.seconds._asdict() for name, values in measured.items()}
    print(f"{'':22} {'seconds [95 % interval]':>24}")
    for name, row in found.items():
        shown = f"{row['median']:.2f} [{row['low']:.2f}, {row['high']:.2f}]"
        print(f"{name:22} {shown:>24}")
    write_json(arguments.out, found)


if __name__ == "__main__":
    main()
