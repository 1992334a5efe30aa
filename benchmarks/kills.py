"""Is a run that is killed again and again the run that was not? Kills `dvc repro` at random moments and compares.

    python -m benchmarks.kills

The tiny experiment of one method runs twice in clones of this repository: once to its end; and once killed, by SIGKILL,
SIGTERM or Ctrl-C, the dvc alone or with all of its processes, so many times over all of its stages, each time some seconds
after the stage began, by chance. Where a kill has torn a file that dvc writes in place, it is put right as a user would (see
docs/RELIABILITY.md), and counted. What both leave is compared: every file of models, tokens and scores by its bits, every metric
that is no time or memory, and in MLflow every point of every finished run. The table goes to the terminal, the numbers to
benchmarks/results/kills.json.
"""

import argparse
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.files import digest, write_json

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
# Steps enough for kills to fall among them, a state after each.
CHANGES = {
    r"(?m)^  - smoe\n": "",
    r"(?ms)(^pretrain:\n  steps: )\d+": r"\g<1>120",
    r"(?ms)(^warmup:\n  steps: )\d+": r"\g<1>30",
    r"(?ms)(^finetune:\n  steps: )\d+": r"\g<1>60",
    r"(?ms)(^resume:\n  steps: )\d+": r"\g<1>1",
}
SIGNALS = ("SIGKILL", "SIGTERM", "SIGINT")
# Keys of results that differ from run to run: ids, times, memory.
VARYING = {"run_id", "tokens_per_second", "low", "high", "seconds", "peak_memory_mib"}
# What dvc says of a file that it was writing when it was killed, and what its user then types.
TORN = {
    r"RWLock-file '\.dvc/tmp/rwlock'": "rm .dvc/tmp/rwlock",
    r"'\./dvc\.lock' (is invalid|validation failed)": "git checkout dvc.lock",
}
STAGES = ("prepare", "pretrain", "warmup", "finetune", "robustness", "compute", "report")


def clone(place: Path) -> Path:
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(place)], check=True)
    text = (place / "presets/tiny.yaml").read_text()
    for pattern, changed in CHANGES.items():
        text = re.sub(pattern, changed, text)
    (place / "params.yaml").write_text(text)
    return place


def start(place: Path) -> subprocess.Popen:
    """`dvc repro`, in a session of its own; what it says goes to log.txt."""
    environment = os.environ | {"PYTHONPATH": str(place), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    environment.pop("MLFLOW_TRACKING_URI", None)
    with open(place / "log.txt", "a") as log:
        return subprocess.Popen(
            ["dvc", "repro"], cwd=place, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )


def stage_of(place: Path) -> str:
    """The stage that dvc named last."""
    named = re.findall(r"Running stage '(\w+)", (place / "log.txt").read_text())
    return named[-1] if named else "none"


def mend(place: Path) -> str:
    """What a user types where dvc has ended by itself for a torn file, done; SystemExit where it has for anything else."""
    said = (place / "log.txt").read_text()
    for words, typed in TORN.items():
        if re.search(words, said):
            subprocess.run(typed.split(), cwd=place, check=True)
            return typed
    raise SystemExit(f"dvc repro ended by itself:\n{said[-2000:]}")


def kill(place: Path, rng: random.Random, longest: float, often: Mapping[str, int], most: int) -> tuple[str, str] | None:
    """Start dvc and kill it some seconds into a stage that was not killed `most` times yet; the stage, and how.

    If it ends before, None, or where it ended for a torn file "torn" and what was typed.
    """
    (place / "log.txt").unlink(missing_ok=True)
    dvc, stage, at = start(place), "none", math.inf
    while time.monotonic() < at:
        time.sleep(0.05)
        if (code := dvc.poll()) is not None:
            return ("torn", mend(place)) if code else None
        if stage_of(place) != stage:
            stage = stage_of(place)
            at = time.monotonic() + rng.uniform(0, longest) if often[stage] < most else math.inf
    name, whole = rng.choice(SIGNALS), rng.random() < 0.5
    (os.killpg if whole else os.kill)(dvc.pid, signal.Signals[name])
    try:
        dvc.wait(60)
    except subprocess.TimeoutExpired:  # dvc leaves Ctrl-C that only it gets to its stage
        os.killpg(dvc.pid, signal.SIGKILL)
        dvc.wait()
    return stage, f"{name}, {'all processes' if whole else 'dvc alone'}"


def finish(place: Path) -> list[str]:
    """Repro to the end; what had to be typed for it, once for each torn file."""
    typed: list[str] = []
    (place / "log.txt").unlink(missing_ok=True)
    while start(place).wait():
        typed.append(mend(place))
        (place / "log.txt").unlink()
        if len(typed) > len(TORN):
            raise SystemExit(f"what is torn stays so: {typed}")
    return typed


def files(place: Path) -> dict[str, str]:
    found = [path for folder in ("outputs", "report/data") for path in sorted((place / folder).rglob("*")) if path.is_file()]
    # Run ids and times differ from run to run, so tables of the report that have them do.
    return {path.relative_to(place).as_posix(): digest(path) for path in found if "report" not in path.parts}


def numbers(value: Any, name: str = "") -> dict[str, Any]:
    """Metrics of result files without times, memory and run ids."""
    if isinstance(value, dict):
        kept = {k: v for k, v in value.items() if k not in VARYING}
        return {key: leaf for k, v in kept.items() for key, leaf in numbers(v, f"{name}/{k}").items()}
    return {name: value}


def metrics(place: Path) -> dict[str, Any]:
    found = {}
    for path in sorted((place / "results").rglob("*.json")):
        found |= numbers(json.loads(path.read_text()), path.relative_to(place).as_posix())
    return found


def differing(whole: Mapping[str, Any], killed: Mapping[str, Any]) -> list[str]:
    """Names that only one of them has, or that do not have the same in both."""
    nothing = object()
    return sorted(name for name in whole.keys() | killed.keys() if whole.get(name, nothing) != killed.get(name, nothing))


def runs(place: Path) -> tuple[Counter, dict[tuple, list[float]]]:
    """How many runs ended how, and the values of each (stage, run, metric, step) of the last finished run, without times.

    A stage that was done, but not yet in dvc.lock, when dvc was killed has finished twice.
    """
    from pipeline.tracking import store

    client = store.connect(place)
    ends, points = Counter(), {}
    for experiment in client.search_experiments():
        last = {}
        for run in client.search_runs([experiment.experiment_id], order_by=["attributes.start_time ASC"]):
            ends[run.info.status] += 1
            if run.info.status == "FINISHED":
                last[run.info.run_name] = run
        for name, run in last.items():
            for key in run.data.metrics:
                if not key.startswith("cost/") and "compute" not in experiment.name:
                    for point in client.get_metric_history(run.info.run_id, key):
                        points.setdefault((experiment.name, name, key, point.step), []).append(point.value)
    return ends, points


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=25, help="how many (default: 25)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and the ways (default: 0)")
    parser.add_argument(
        "--longest", type=float, default=8.0, help="seconds into a stage after which it is killed at the latest (default: 8)"
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "kills.json", help="where the numbers go")
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as folder:
        whole, killed = clone(Path(folder) / "whole"), clone(Path(folder) / "killed")
        finish(whole)
        kills, torn = [], []
        often: Counter[str] = Counter()
        most = math.ceil(1.25 * arguments.kills / len(STAGES))  # more than its share: a stage may end before it is killed
        while len(kills) < arguments.kills and len(torn) <= len(kills):
            found = kill(killed, rng, arguments.longest, often, most)
            if found is None:
                break
            if found[0] == "torn":
                torn.append(found[1])
                print(f"torn: {found[1]}", flush=True)
                continue
            kills.append(found)
            often[found[0]] += 1
            print(f"killed {len(kills)}: {found[0]}, {found[1]}", flush=True)
            time.sleep(0.5)
        torn += finish(killed)
        expected, measured = files(whole), metrics(whole)
        (ends, points), (_, wanted) = runs(killed), runs(whole)
        found = {
            "kills": len(kills),
            "by_stage": Counter(stage for stage, _ in kills),
            "by_way": Counter(way for _, way in kills),
            "torn": Counter(torn),
            "files": len(expected),
            "files_that_differ": differing(expected, files(killed)),
            "metrics": len(measured),
            "metrics_that_differ": differing(measured, metrics(killed)),
            "points": len(wanted),
            "points_lost": len(wanted.keys() - points.keys()),
            "points_twice": sum(len(values) > 1 for values in points.values()),
            "points_that_differ": sum(points[place][0] != wanted[place][0] for place in wanted.keys() & points.keys()),
            "runs": ends,
        }
    for name, value in found.items():
        print(f"{name:20} {json.dumps(value)}", flush=True)
    write_json(arguments.out, found)
    if any(found[name] for name in found if name.endswith(("_differ", "_lost", "_twice"))):
        sys.exit(1)


if __name__ == "__main__":
    main()
