"""Group tokens by expert, run the experts, put the results back in order. No parameters.

Shapes: N tokens, K experts per token, A = N K assignments, D width, E experts.
"""

import torch
from torch import Tensor

from pipeline.moe.experts import Experts


def apply_experts(experts: Experts, x: Tensor, index_NK: Tensor, drop: bool = True) -> Tensor:
    """y[n, k] = FFN_{index[n, k]}(x[n]) for x of shape (N, D), or of x[n, k] for x of shape (N, K, D).

    Returns (N, K, D). One sort and one grouped product per layer of the experts, whatever K is. Without `drop` the experts
    leave out their dropout.
    """
    tokens, slots = index_NK.shape
    index_A = index_NK.reshape(-1)
    order_A = torch.argsort(index_A, stable=True)
    inverse_A = torch.empty_like(order_A)
    inverse_A[order_A] = torch.arange(order_A.numel(), device=order_A.device)
    rows_E = torch.bincount(index_A, minlength=experts.count)
    copies = slots if x.dim() == 2 else 1
    x_AD = _Gather.apply(x.reshape(-1, x.shape[-1]), order_A, inverse_A, copies)
    y_AD = experts(x_AD, rows_E, drop)
    return _Gather.apply(y_AD, inverse_A, order_A, 1).view(tokens, slots, -1)


def combine(y_NKD: Tensor, weight_NK: Tensor) -> Tensor:
    """sum_k w_k y_k (N, D)."""
    return (weight_NK[..., None] * y_NKD).sum(1)


class _Gather(torch.autograd.Function):
    """out[a] = x[order[a] // copies], with a backward that gathers too.

    Autograd's own backward of an index is a scatter-add: slower, and on a GPU not the same bits from run to run.
    """

    @staticmethod
    def forward(ctx, x_ND: Tensor, order_A: Tensor, inverse_A: Tensor, copies: int) -> Tensor:
        ctx.save_for_backward(inverse_A)
        ctx.copies = copies
        return x_ND[order_A // copies if copies > 1 else order_A]

    @staticmethod
    def backward(ctx, grad_AD: Tensor) -> tuple[Tensor, None, None, None]:
        (inverse_A,) = ctx.saved_tensors
        grad_AD = grad_AD[inverse_A]
        return grad_AD if ctx.copies == 1 else grad_AD.view(-1, ctx.copies, grad_AD.shape[-1]).sum(1), None, None, None
