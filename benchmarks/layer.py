"""What routing costs: a training pass of each method's layer against a dense feed-forward of the same active FLOPs.

    python -m benchmarks.layer
    python -m benchmarks.layer --device cuda --tokens 65536 --width 1024 --hidden 2048 --experts 16 64

Forward and backward, timed in turns; beside the project's layers the experts' products alone, on blocks of tokens of equal size,
which is what no dispatch can do without; a loop over experts with boolean masks, as the released code has it in VQMoE's discrete
path (its routed experts need kernels compiled for CUDA); and the layers of transformers and st-moe-pytorch, where those are
installed. The table goes to the terminal, the numbers to benchmarks/results/layer.json.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline import config
from pipeline.config import Machine
from pipeline.evaluation.compute import interval, measure
from pipeline.files import write_json
from pipeline.moe.experts import Experts
from pipeline.moe.layer import SETTINGS, build_layer
from pipeline.moe.routers.base import Sizes
from pipeline.training.machine import at_work
from pipeline.training.seeding import seed_everything

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
# Tokens of the sequences that st-moe-pytorch is given: within each its experts take at most so many, the rest is dropped.
SEQUENCE = 256
# A name, the method, its mode, and experts per token. An expert of either library has three matrices, so 1.5 times the FLOPs.
LAYERS = [
    ("dense (k=2)", "dense", "dense", 2),
    ("smoe", "smoe", "router", 2),
    ("xmoe", "xmoe", "router", 2),
    ("vqmoe, both paths", "vqmoe", "both", 2),
    ("dense (k=1)", "dense", "dense", 1),
    ("vqmoe, discrete path", "vqmoe", "discrete", 1),
]


class MaskLoop(nn.Module):
    """Top-2 of E experts, one after another, each on the rows that a boolean mask finds."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.scores, self.experts = nn.Linear(sizes.width, sizes.experts), Experts(sizes.experts, sizes.width, sizes.hidden)

    def forward(self, x_ND: Tensor) -> Tensor:
        top_NK, index_NK = self.scores(x_ND).topk(2)
        weight_NK, y_ND, experts = top_NK.softmax(-1), torch.zeros_like(x_ND), self.experts
        for expert in range(experts.count):
            for slot in range(2):
                mask_N = index_NK[:, slot] == expert
                h = F.gelu(F.linear(x_ND[mask_N], experts.w1_EDH[expert].T, experts.b1_EH[expert]))
                y = F.linear(h, experts.w2_EHD[expert].T, experts.b2_ED[expert])
                y_ND[mask_N] = y_ND[mask_N] + (weight_NK[mask_N, slot, None] * y).to(y_ND.dtype)
        return y_ND


def works(sizes: Sizes, tokens: int, machine: Machine) -> dict[str, Callable[[], Any]]:
    """One training pass of each layer by its name."""
    seed_everything(0, "benchmark")
    methods = config.load(ROOT / "params.yaml", SETTINGS).methods
    x_ND, upstream_ND = (torch.randn(tokens, sizes.width, device=machine.device) for _ in range(2))
    x_ND.requires_grad_()
    found = {}
    for name, method, mode, top_k in LAYERS:
        changes = {"dense": {"top_k": top_k}, "vqmoe": {"codes": sizes.experts}}.get(method, {})
        settings = SETTINGS[method](**(methods[method].model_dump() | changes))
        layer = build_layer(method, settings, sizes).to(machine.device)
        found[name] = _pass(layer, lambda layer=layer, mode=mode: _answer(layer, x_ND, mode), x_ND, upstream_ND)
    blocks = Experts(sizes.experts, sizes.width, sizes.hidden).to(machine.device)
    for top_k in (2, 1):
        found[f"blocks (k={top_k})"] = _pass(blocks, lambda top_k=top_k: (_blocks(blocks, x_ND, top_k), 0.0), x_ND, upstream_ND)
    loop = MaskLoop(sizes).to(machine.device)
    found["mask loop"] = _pass(loop, lambda: (loop(x_ND), 0.0), x_ND, upstream_ND)
    for name, block in _transformers(sizes):
        block = block.to(machine.device)
        found[name] = _pass(block, lambda block=block: (block(x_ND[None])[0], 0.0), x_ND, upstream_ND)
    for name, block in _st_moe(sizes):
        block = block.to(machine.device)
        found[name] = _pass(block, lambda block=block: block(x_ND.unflatten(0, (-1, SEQUENCE)))[:2], x_ND, upstream_ND)
    return found


def _blocks(experts: Experts, x_ND: Tensor, top_k: int) -> Tensor:
    """The experts' products alone: each has as many tokens, and these lie where it reads them."""
    x_ERD = x_ND.expand(top_k, -1, -1).reshape(experts.count, -1, x_ND.shape[1])
    return experts(x_ERD).view(top_k, *x_ND.shape).sum(0)


def _answer(layer: nn.Module, x_ND: Tensor, mode: str) -> tuple[Tensor, Any]:
    output = layer(x_ND, mode)
    return output.y_ND, sum(loss.weight * loss.value for loss in output.losses.values())


def _pass(layer: nn.Module, answer: Callable[[], tuple[Tensor, Any]], x_ND: Tensor, upstream_ND: Tensor) -> Callable[[], None]:
    layer.train()

    def run() -> None:
        layer.zero_grad()
        x_ND.grad = None
        y_ND, losses = answer()
        ((y_ND.view_as(upstream_ND) * upstream_ND).sum() + losses).backward()

    return run


def _transformers(sizes: Sizes) -> list[tuple[str, nn.Module]]:
    try:
        from transformers import MixtralConfig
        from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
    except ImportError:
        return []
    blocks = []
    for kind in ("eager", "grouped_mm"):
        given = MixtralConfig(
            hidden_size=sizes.width, intermediate_size=sizes.hidden, num_local_experts=sizes.experts, num_experts_per_tok=2
        )
        given._experts_implementation = kind
        block = MixtralSparseMoeBlock(given)
        for parameter in block.parameters():
            nn.init.normal_(parameter, std=0.02)
        blocks.append((f"transformers, {kind}", block))
    return blocks


def _st_moe(sizes: Sizes) -> list[tuple[str, nn.Module]]:
    try:
        from st_moe_pytorch import MoE
    except ImportError:
        return []
    return [("st-moe-pytorch", MoE(sizes.width, sizes.experts, expert_hidden_mult=1.5 * sizes.hidden / sizes.width))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--hidden", type=int, default=512, help="hidden width of an expert (default: 512)")
    parser.add_argument("--experts", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--repeats", type=int, default=15, help="timed rounds, at least 6 (default: 15)")
    parser.add_argument("--out", type=Path, default=RESULTS / "layer.json", help="where the numbers go")
    arguments = parser.parse_args()
    machine = Machine(device=arguments.device, precision="bf16" if arguments.device == "cuda" else "fp32", processes=1)
    name = torch.cuda.get_device_name() if machine.device == "cuda" else f"{torch.get_num_threads()} threads"
    found: dict[str, Any] = {"machine": name, "precision": machine.precision, "shape": vars(arguments) | {"out": None}}
    for experts in arguments.experts:
        sizes = Sizes(arguments.width, experts, arguments.hidden, 0, 0.0)
        shape = f"{arguments.tokens} tokens, width {sizes.width}, {experts} experts of width {sizes.hidden}"
        print(f"{shape}, {machine.precision}, {name}")
        print(f"{'':22} {'ms':>9} {'time / dense [95 % interval]':>30} {'memory / dense':>15}")
        with at_work(machine):
            measured = measure(works(sizes, arguments.tokens, machine), arguments.repeats)
        for work, values in measured.items():
            dense = measured["dense (k=1)" if work in ("vqmoe, discrete path", "blocks (k=1)") else "dense (k=2)"]
            ratio = interval(values.seconds_R / dense.seconds_R)
            memory = values.peak_memory_mib / dense.peak_memory_mib
            found[f"{work}, {experts} experts"] = ratio._asdict() | {"ms": 1e3 * values.seconds.median, "memory": memory}
            shown = f"{ratio.median:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]"
            print(f"{work:22} {1e3 * values.seconds.median:9.2f} {shown:>30} {memory:15.2f}")
    write_json(arguments.out, found)


if __name__ == "__main__":
    main()
