import json
import subprocess
import sys
import time

import torch

from benchmarks.layer import MaskLoop, works
from pipeline.config import Machine
from pipeline.evaluation.compute import interval, measure
from pipeline.moe.dispatch import apply_experts
from pipeline.moe.routers.base import Sizes
from tests.conftest import REPOSITORY

MINE = ("smoe", "vqmoe, both paths")


def test_it_writes_what_it_prints(tmp_path):
    out = tmp_path / "layer.json"
    shape = ["--tokens", "512", "--width", "32", "--hidden", "64", "--experts", "4", "8", "--repeats", "6"]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.layer", *shape, "--out", str(out)],
        cwd=REPOSITORY, capture_output=True, text=True, env={"PYTHONPATH": ".", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    lines = [line for line in done.stdout.splitlines() if line.startswith(("smoe", "vqmoe, both paths"))]
    names = [f"{name}, {experts} experts" for experts in (4, 8) for name in ("smoe", "vqmoe, both paths")]
    for line, name in zip(lines, names, strict=True):
        row = found[name]
        assert f"{row['median']:.2f} [{row['low']:.2f}, {row['high']:.2f}]" in line
        assert row["median"] > 0 and row["ms"] > 0


def test_routing_costs_far_less_than_a_loop(one_thread):
    """In seconds of the processor, which what runs beside the tests takes no part of."""
    ratio = {}
    for experts in (8, 32):
        passes = works(Sizes(128, experts, 256, 0, 0.0), 2048, Machine(device="cpu", precision="fp32", processes=1))
        timed = measure({name: passes[name] for name in (*MINE, "dense (k=2)", "mask loop")}, 7, time.process_time)
        dense_R = timed.pop("dense (k=2)").seconds_R
        for name, row in timed.items():
            ratio[name, experts] = interval(row.seconds_R / dense_R)
    for name in MINE:
        # Quietly 1.2 to 1.4 times a dense layer with 8 experts; with 32 experts the loop costs five times what these do.
        assert ratio[name, 8].low < 2
        assert ratio[name, 32].median < ratio["mask loop", 32].median / 2


def test_the_loop_with_masks_computes_what_it_is_compared_with():
    torch.manual_seed(0)
    loop, x_ND = MaskLoop(Sizes(16, 4, 32, 0, 0.0)), torch.randn(40, 16)
    torch.nn.init.normal_(loop.experts.b1_EH)
    top_NK, index_NK = loop.scores(x_ND).topk(2)
    torch.testing.assert_close(loop(x_ND), apply_experts(loop.experts, x_ND, index_NK, top_NK.softmax(-1)))
