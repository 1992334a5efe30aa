"""Floating-point operations of a forward pass, counted by torch's flop counter (a multiply-add is two)."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from pipeline.models.transformer import Transformer
from pipeline.moe.layer import Mode


def _grouped_mm(x_shape: torch.Size, weight_shape: torch.Size, *args: object, out_shape: object = None, **kwargs: object) -> int:
    """Rows x in x out: every row meets one expert's matrix, however the rows are grouped."""
    return 2 * x_shape[0] * weight_shape[-2] * weight_shape[-1]


def _attention(q: torch.Size, k: torch.Size, v: torch.Size, *args: object, out_shape: object = None, **kwargs: object) -> int:
    """Scores and their weighted sum over all positions, as torch counts its other attention kernels."""
    return sdpa_flop_count(q, k, v)


# Operators in use that torch's counter does not know.
_FORMULAS = {
    torch.ops.aten._grouped_mm: _grouped_mm,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
}


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
    width = model.embedding.embedding_dim

    def states(sequences: int) -> int:
        past = [torch.zeros(sequences, memory, width) for _ in model.blocks] if memory else None
        tokens_BT = torch.zeros(sequences, length, dtype=torch.long)
        return _count(lambda: model(tokens_BT, mode, memory=past))

    total = (states(2) - states(1)) / length
    if targets is not None:
        target_N = torch.as_tensor(np.asarray(targets, dtype=np.int64))
        total += _count(lambda: model.nats(torch.zeros(len(target_N), width), target_N)) / len(target_N)
    model.train(was_training)
    return total


def _count(run: Callable[[], object]) -> int:
    with FlopCounterMode(display=False, custom_mapping=_FORMULAS) as counter:
        run()
    return counter.get_total_flops()
