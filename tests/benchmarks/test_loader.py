import json
import subprocess
import sys

from tests.conftest import REPOSITORY


def test_it_runs_and_writes_what_it_prints(tmp_path):
    command = [
        sys.executable,
        "-m",
        "benchmarks.loader",
        "text",
        "vision/digits",
        "--repeats",
        "6",
        "--out",
        str(tmp_path / "loader.json"),
    ]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, env={"PYTHONPATH": "."})
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "loader.json").read_text())
    for name, row in found.items():
        (line,) = (line for line in done.stdout.splitlines() if line.startswith(name))
        assert f"{row['batch_ms']:.2f}" in line
        # Far from what is measured (tens to hundreds), so that a busy machine passes, and a slow loader does not.
        assert row["steps_per_batch"] > 2
