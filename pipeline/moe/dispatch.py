"""Group tokens by expert, run the experts, put the results back in order. No parameters.

Shapes: N tokens, K experts per token, A = N K assignments, R of them that have an expert, D width, E experts.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.moe.experts import Experts


def apply_experts(experts: Experts, x: Tensor, index_NK: Tensor, drop: bool = True) -> Tensor:
    """y[n, k] = FFN_{index[n, k]}(x[n]) for x of shape (N, D), or of x[n, k] for x of shape (N, K, D).

    Returns (N, K, D). One sort and one grouped product per layer of the experts, whatever K is. An index of -1 is no expert:
    zeros, which cost nothing. Without `drop` the experts leave out their dropout.
    """
    tokens, slots = index_NK.shape
    index_A = index_NK.reshape(-1)
    count = torch.bincount(index_A + 1, minlength=experts.count + 1)
    order_R = torch.argsort(index_A, stable=True)[count[0] :]
    inverse_A = torch.full_like(index_A, -1)
    inverse_A[order_R] = torch.arange(order_R.numel(), device=order_R.device)
    copies = slots if x.dim() == 2 else 1
    x_RD = _Gather.apply(x.reshape(-1, x.shape[-1]), order_R, inverse_A, copies)
    y_RD = experts(x_RD, count[1:], drop)
    return _Gather.apply(y_RD, inverse_A, order_R, 1).view(tokens, slots, -1)


def combine(y_NKD: Tensor, weight_NK: Tensor) -> Tensor:
    """sum_k w_k y_k (N, D)."""
    return (weight_NK[..., None] * y_NKD).sum(1)


class _Gather(torch.autograd.Function):
    """out[a] = x[order[a] // copies], zeros where order[a] is -1, with a backward that gathers too.

    `inverse` says of each (copied) row of x where it went, -1 if nowhere. Autograd's own backward of an index is a scatter-add:
    slower, and on a GPU not the same bits from run to run.
    """

    @staticmethod
    def forward(ctx, x: Tensor, order: Tensor, inverse: Tensor, copies: int) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.copies = copies
        return _rows(x, order // copies if copies > 1 else order, len(order) > len(inverse))

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (inverse,) = ctx.saved_tensors
        grad = _rows(grad, inverse, len(inverse) > len(grad))
        return grad if ctx.copies == 1 else grad.view(-1, ctx.copies, grad.shape[-1]).sum(1), None, None, None


def _rows(x: Tensor, index: Tensor, holes: bool) -> Tensor:
    """x[index], where -1 is a row of zeros if there are such holes."""
    return F.pad(x, (0, 0, 0, 1))[index] if holes else x[index]
