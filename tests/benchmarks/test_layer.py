import json
import subprocess
import sys

import torch

from benchmarks.layer import MaskLoop
from pipeline.moe.dispatch import apply_experts
from pipeline.moe.routers.base import Sizes
from tests.conftest import REPOSITORY


def test_it_runs_and_routing_costs_far_less_than_a_loop(tmp_path):
    out = tmp_path / "layer.json"
    shape = ["--tokens", "2048", "--width", "128", "--hidden", "256", "--experts", "8", "32", "--repeats", "7"]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.layer", *shape, "--out", str(out)],
        cwd=REPOSITORY, capture_output=True, text=True, env={"PYTHONPATH": ".", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    for name in ("smoe", "vqmoe, both paths"):
        _, line = (line for line in done.stdout.splitlines() if line.startswith(name))
        row = found[f"{name}, 32 experts"]
        assert f"{row['median']:.2f} [{row['low']:.2f}, {row['high']:.2f}]" in line
        # A loop costs four to five times what these do: a busy machine passes, a dispatch that has become a loop does not.
        assert row["median"] < found["mask loop, 32 experts"]["median"] / 2
        # 1.2 to 1.4 times a dense layer, measured quietly.
        assert found[f"{name}, 8 experts"]["median"] < 2


def test_the_loop_with_masks_computes_what_it_is_compared_with():
    torch.manual_seed(0)
    loop, x_ND = MaskLoop(Sizes(16, 4, 32, 0, 0.0)), torch.randn(40, 16)
    torch.nn.init.normal_(loop.experts.b1_EH)
    top_NK, index_NK = loop.scores(x_ND).topk(2)
    torch.testing.assert_close(loop(x_ND), apply_experts(loop.experts, x_ND, index_NK, top_NK.softmax(-1)))
