"""Floating-point operations, counted by torch's flop counter (a multiply-add is two), and the parameters a token meets.

Both are per token; of an image the tokens are its patches, which makes numbers of text and images comparable.
"""

import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from pipeline.models.transformer import Transformer
from pipeline.models.vit import Vit
from pipeline.moe.layer import Mode, SoftMoE


def _grouped_mm(x_shape: torch.Size, weight_shape: torch.Size, *args: object, out_shape: object = None, **kwargs: object) -> int:
    """Rows x in x out: every row meets one expert's matrix, however the rows are grouped.

    So too where a backward groups the sum: of (in, rows) by (rows, out) every row goes into one expert's gradient.
    """
    return 2 * x_shape[0] * weight_shape[-2] * weight_shape[-1]


def _attention(q: torch.Size, k: torch.Size, v: torch.Size, *args: object, out_shape: object = None, **kwargs: object) -> int:
    """Scores and their weighted sum over all positions, as torch counts its other attention kernels."""
    return sdpa_flop_count(q, k, v)


def _attention_backward(
    grad: torch.Size, q: torch.Size, k: torch.Size, v: torch.Size, *args: object, out_shape: object = None, **kwargs: object
) -> int:
    return sdpa_backward_flop_count(grad, q, k, v)


# Operators in use that torch's counter does not know.
_FORMULAS = {
    torch.ops.aten._grouped_mm: _grouped_mm,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


def count_flops(run: Callable[[], object]) -> int:
    """FLOPs of the matrix products and attention in one call of `run`, a backward pass included."""
    with FlopCounterMode(display=False, custom_mapping=_FORMULAS) as counter:
        run()
    return counter.get_total_flops()


@torch.no_grad()
def flops_per_token(
    model: Transformer, mode: Mode, length: int, memory: int = 0, targets: Sequence[int] | np.ndarray | None = None
) -> float:
    """Active FLOPs per token of a sequence of `length` tokens, after `memory` remembered ones, to the last hidden states.

    Counts matrix products and attention (what torch counts), the quantizer's distances and the router included, but not
    what is the same for all sequences of a batch: projections of relative positions, a router made by a hypernetwork.
    With `targets` also their scores, as the mean over these ids: in an adaptive softmax a rare token costs more than a
    frequent one, so they should be a sample of real text.
    """
    was_training = model.training
    model.eval()
    width = model.width

    def states(sequences: int) -> int:
        past = [torch.zeros(sequences, memory, width, device=model.device) for _ in model.blocks] if memory else None
        tokens_BT = torch.zeros(sequences, length, dtype=torch.long)
        return count_flops(lambda: model(tokens_BT, mode, memory=past))

    total = (states(2) - states(1)) / length
    if targets is not None:
        target_N = torch.as_tensor(np.asarray(targets, dtype=np.int64))
        state_ND = torch.zeros(len(target_N), width, device=model.device)
        total += count_flops(lambda: model.nats(state_ND, target_N)) / len(target_N)
    model.train(was_training)
    return total


@torch.no_grad()
def flops_per_patch(model: Vit, mode: Mode) -> float:
    """Active FLOPs of an image's forward pass, class token and head included, over its number of patches.

    Counts what `flops_per_token` counts. What a full expert saves in training, where it turns tokens away, is not in it.
    """
    was_training = model.training
    model.eval()
    once, twice = (count_flops(lambda many=many: model(torch.zeros(many, *model.shape), mode)) for many in (1, 2))
    model.train(was_training)
    return (twice - once) / math.prod(model.grid)


@torch.no_grad()
def active_parameters(model: Transformer | Vit, mode: Mode) -> int:
    """How many of the model's parameters a token can meet in a forward pass.

    Of its mixture layers those that the mode reads (in `discrete` neither router nor gate, in `router` no codebook), and of E
    experts as many as one token goes to, of Soft MoE, where it is a part of all slots, all; all else whole, embeddings too. As
    everywhere, a parameter is what an optimizer may move: a frozen router and a codebook of moving averages are none.
    """
    was_training = model.training
    model.eval()
    with _Reads() as reads:
        if isinstance(model, Vit):
            _, hidden = model(torch.zeros(1, *model.shape), mode)
        else:
            hidden = model(torch.zeros(1, 1, dtype=torch.long), mode)
    model.train(was_training)
    total = _size(model.parameters())
    for layer, output in zip(model.moe_layers, hidden.layers, strict=True):
        total -= _size(parameter for parameter in layer.parameters() if id(parameter) not in reads.seen)
        # Two paths may ask for the same expert, and never for more than there are.
        asked = layer.experts.count if isinstance(layer, SoftMoE) else output.index_NK.shape[1]
        met = min(asked, layer.experts.count)
        total -= _size(layer.experts.parameters()) * (layer.experts.count - met) // layer.experts.count
    return total


class _Reads(TorchDispatchMode):
    """Sees which parameters are the arguments of operators, by their ids."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen |= {id(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, nn.Parameter)}
        return func(*args, **(kwargs or {}))


def _size(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)
