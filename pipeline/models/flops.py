"""Floating-point operations of a forward pass, counted by torch's flop counter (a multiply-add is two)."""

import torch
from torch import Tensor
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
def flops_per_token(model: Transformer, mode: Mode, length: int, next_token: bool = True) -> float:
    """Active FLOPs per token of one sequence of `length` tokens, to next-token scores or only to the last hidden states.

    Counts matrix products and attention (what torch counts), the quantizer's distances and the router included.
    """
    tokens_BT: Tensor = torch.zeros(1, length, dtype=torch.long)
    was_training = model.training
    model.eval()
    with FlopCounterMode(display=False, custom_mapping=_FORMULAS) as counter:
        state_BTD = model(tokens_BT, mode).state_BTD
        if next_token:
            model.logits(state_BTD)
    model.train(was_training)
    return counter.get_total_flops() / length
