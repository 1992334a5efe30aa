"""Send tokens to experts and bring the answers back in order. No parameters.

On a CPU one expert after another computes its rows while they are in the cache, forward and backward by hand: what is not matrix
products nearly vanishes, and of all assignments only hidden states are kept, as in any feed-forward. On a GPU, where that would
be many small kernels and the host would wait for the number of rows, all experts compute in two grouped products.

Shapes: N tokens, K experts per token, A = N K assignments, R of them that have an expert, M rows of x, D width, H hidden width,
E experts.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.moe.experts import Experts

_DERIVATIVES = {
    "gelu": torch.ops.aten.gelu_backward.default,
    "relu": lambda grad, h: torch.ops.aten.threshold_backward.default(grad, h, 0),
}


def apply_experts(experts: Experts, x: Tensor, index_NK: Tensor, weight_NK: Tensor | None = None, *, drop: bool = True) -> Tensor:
    """sum_k w[n, k] FFN_{index[n, k]}(x[n]) (N, D) for x of shape (N, D), or of x[n, k] for x of shape (N, K, D).

    Without weights the answers themselves (N, K, D). An index of -1 is no expert: zeros. Without `drop` the experts leave out
    their dropout.
    """
    dropout = experts.dropout if experts.training and drop else 0.0
    return (each_expert if x.device.type == "cpu" else grouped)(experts, x, index_NK, weight_NK, dropout)


def combine(y_NKD: Tensor, weight_NK: Tensor) -> Tensor:
    """sum_k w_k y_k (N, D)."""
    return (weight_NK[:, None] @ y_NKD).squeeze(1)


def each_expert(experts: Experts, x: Tensor, index_NK: Tensor, weight_NK: Tensor | None, dropout: float) -> Tensor:
    """`apply_experts` one expert after another: the fastest way on a few cores, and the one with the least memory."""
    parameters = experts.w1_EDH, experts.b1_EH, experts.w2_EHD, experts.b2_ED
    inputs = x.reshape(-1, x.shape[-1]), *parameters, weight_NK
    learns = torch.is_grad_enabled() and any(one is not None and one.requires_grad for one in inputs)
    return _EachExpert.apply(*inputs, index_NK, dropout, experts.activation, learns)


class _EachExpert(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_MD: Tensor,
        w1_EDH: Tensor,
        b1_EH: Tensor,
        w2_EHD: Tensor,
        b2_ED: Tensor,
        weight_NK: Tensor | None,
        index_NK: Tensor,
        dropout: float,
        activation: str,
        learns: bool,
    ) -> Tensor:
        tokens, slots = index_NK.shape
        index_A = index_NK.reshape(-1)
        nowhere, *rows = torch.bincount(index_A + 1, minlength=len(w1_EDH) + 1).tolist()
        order_R = torch.argsort(index_A, stable=True)[nowhere:]
        # Where an assignment's answer is; that to no expert finds the zeros after the last one.
        place_A = torch.full_like(index_A, len(order_R))
        place_A[order_R] = torch.arange(len(order_R))
        token_R = order_R // slots
        row_R = token_R if len(x_MD) == tokens else order_R
        y_RD, kept = _with_zeros(x_MD, len(order_R)), []
        for expert, part in _parts(rows):
            h_RH = torch.addmm(b1_EH[expert], x_MD.index_select(0, row_R[part]), w1_EDH[expert])
            a_RH, mask_RH = getattr(F, activation)(h_RH), None
            if dropout:
                a_RH, mask_RH = torch.native_dropout(a_RH, dropout, True)
            torch.addmm(b2_ED[expert], a_RH, w2_EHD[expert], out=y_RD[part])
            if learns:
                kept += [h_RH, a_RH, mask_RH]
        ctx.save_for_backward(x_MD, w1_EDH, b1_EH, w2_EHD, b2_ED, weight_NK, order_R, token_R, row_R, place_A, *kept)
        ctx.rows, ctx.dropout, ctx.activation = rows, dropout, activation
        if weight_NK is None:
            return y_RD.index_select(0, place_A).view(tokens, slots, -1)
        return F.embedding_bag(place_A.view(tokens, slots), y_RD, mode="sum", per_sample_weights=weight_NK)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x_MD, w1_EDH, b1_EH, w2_EHD, b2_ED, weight_NK, order_R, token_R, row_R, place_A, *kept = ctx.saved_tensors
        wants_x, wants_experts, wants_weight = ctx.needs_input_grad[0], any(ctx.needs_input_grad[1:5]), ctx.needs_input_grad[5]
        dw1_EDH, db1_EH, dw2_EHD, db2_ED = (
            one.new_zeros(one.shape) if wants_experts else None for one in (w1_EDH, b1_EH, w2_EHD, b2_ED)
        )
        dx_RD, dweight_R = _with_zeros(x_MD, len(order_R)), grad.new_zeros(len(order_R) + 1)
        # Without weights each assignment has a gradient of its own, with them each token.
        source_R, grad = (order_R, grad.flatten(0, 1)) if weight_NK is None else (token_R, grad)
        weight_R1 = None if weight_NK is None else weight_NK.reshape(-1, 1)[order_R]
        for (expert, part), h_RH, a_RH, mask_RH in zip(_parts(ctx.rows), kept[::3], kept[1::3], kept[2::3], strict=True):
            dy_RD = grad.index_select(0, source_R[part])
            da_RH = dy_RD @ w2_EHD[expert].T
            if wants_weight:
                # <dy, W2 a + b2>, without the answer itself.
                dweight_R[part] = torch.addmv((da_RH * a_RH).sum(1), dy_RD, b2_ED[expert])
            if weight_R1 is not None:
                dy_RD, da_RH = dy_RD.mul_(weight_R1[part]), da_RH.mul_(weight_R1[part])
            if mask_RH is not None:
                da_RH = torch.ops.aten.native_dropout_backward(da_RH, mask_RH, 1 / (1 - ctx.dropout))
            dh_RH = _DERIVATIVES[ctx.activation](da_RH, h_RH)
            if wants_experts:
                torch.mm(a_RH.T, dy_RD, out=dw2_EHD[expert])
                torch.sum(dy_RD, 0, out=db2_ED[expert])
                torch.mm(x_MD.index_select(0, row_R[part]).T, dh_RH, out=dw1_EDH[expert])
                torch.sum(dh_RH, 0, out=db1_EH[expert])
            if wants_x:
                torch.mm(dh_RH, w1_EDH[expert].T, out=dx_RD[part])
        if row_R is order_R:
            dx_MD = dx_RD.index_select(0, place_A)
        else:
            dx_MD = F.embedding_bag(place_A.view(len(x_MD), -1), dx_RD, mode="sum")
        dweight_NK = dweight_R[place_A].view_as(weight_NK) if wants_weight else None
        return dx_MD if wants_x else None, dw1_EDH, db1_EH, dw2_EHD, db2_ED, dweight_NK, None, None, None, None


def _parts(rows: list[int]) -> Iterator[tuple[int, slice]]:
    """The experts that have rows, and which these are."""
    first = 0
    for expert, count in enumerate(rows):
        if count:
            yield expert, slice(first, first + count)
        first += count


def _with_zeros(like: Tensor, rows: int) -> Tensor:
    """Room for so many rows as wide as another tensor's, and one of zeros after them."""
    room = like.new_empty(rows + 1, like.shape[1])
    room[-1] = 0
    return room


def grouped(experts: Experts, x: Tensor, index_NK: Tensor, weight_NK: Tensor | None, dropout: float) -> Tensor:
    """`apply_experts` by products of all experts at once, without waiting for the GPU to say how many rows each has.

    So an assignment to no expert costs as much as another: the first expert answers, and its answer counts nothing.
    """
    kind = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
    w1_EDH, b1_EH, w2_EHD, b2_ED = (one.to(kind) for one in (experts.w1_EDH, experts.b1_EH, experts.w2_EHD, experts.b2_ED))
    tokens, slots = index_NK.shape
    expert_A, order_A = index_NK.clamp(min=0).flatten().sort(stable=True)
    place_A = torch.empty_like(order_A).scatter_(0, order_A, torch.arange(len(order_A), device=x.device))
    ends_E = torch.searchsorted(expert_A, torch.arange(experts.count, device=x.device), right=True).to(torch.int32)
    x_AD = _Gather.apply(x.reshape(-1, x.shape[-1]).to(kind), order_A, place_A, slots if x.dim() == 2 else 1)
    h_AH = _Biased.apply(F.grouped_mm(x_AD, w1_EDH, offs=ends_E), b1_EH, expert_A, ends_E)
    a_AH = F.dropout(getattr(F, experts.activation)(h_AH), dropout)
    y_AD = _Biased.apply(F.grouped_mm(a_AH, w2_EHD, offs=ends_E), b2_ED, expert_A, ends_E)
    y_NKD = _Gather.apply(y_AD, place_A, order_A, 1).view(tokens, slots, -1)
    if weight_NK is None:
        return y_NKD.masked_fill((index_NK < 0)[..., None], 0)
    return combine(y_NKD, weight_NK.to(kind).masked_fill(index_NK < 0, 0))


class _Gather(torch.autograd.Function):
    """out[a] = x[order[a] // copies], with a backward that gathers too.

    `inverse` says of each (copied) row of x where it went. Autograd's own backward of an index is a scatter-add: slower, and on
    a GPU not the same bits from run to run.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor, copies: int) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.copies = copies
        return x[order // copies if copies > 1 else order]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (inverse,) = ctx.saved_tensors
        grad = grad[inverse]
        return grad if ctx.copies == 1 else grad.view(-1, ctx.copies, grad.shape[-1]).sum(1), None, None, None


class _Biased(torch.autograd.Function):
    """x[a] + b[expert[a]] in place, for rows in order of their expert; the gradient of b is a sum over each expert's rows."""

    @staticmethod
    def forward(ctx: Any, x_AD: Tensor, b_ED: Tensor, expert_A: Tensor, ends_E: Tensor) -> Tensor:
        ctx.save_for_backward(ends_E)
        ctx.mark_dirty(x_AD)
        return x_AD.add_(b_ED[expert_A])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (ends_E,) = ctx.saved_tensors
        grad = grad.contiguous()
        # A grouped product with ones; eight rows of them, since a GPU wants multiples of 16 bytes.
        sums_E8D = F.grouped_mm(grad.new_ones(len(grad), 8).T, grad, offs=ends_E)
        return grad, sums_E8D[:, 0], None, None
