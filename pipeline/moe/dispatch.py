"""Send tokens to experts and bring the answers back in order. No parameters.

On a CPU one expert after another computes its rows while they are in the cache, forward and backward by hand: what is not matrix
products nearly vanishes, and of all assignments only hidden states are kept, as in any feed-forward. On a GPU, where that would
be many small kernels and the host would wait for the number of rows, all experts compute in two grouped products.

Shapes: N tokens, K experts per token, A = N K assignments, R of them that have an expert, M rows of x, D width, H hidden width,
E experts.
"""

from collections.abc import Iterable
from itertools import chain, repeat
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.moe.experts import Experts

# Of the activation, times a gradient, in its place.
_DERIVATIVES = {
    "gelu": lambda grad, h: torch.ops.aten.gelu_backward.grad_input(grad, h, grad_input=grad),
    "relu": lambda grad, h: torch.ops.aten.threshold_backward.grad_input(grad, h, 0, grad_input=grad),
}


class Shift(NamedTuple):
    """What the last expert of each token reads is not x but x + table[code]."""

    table_CD: Tensor
    code_N: Tensor


def apply_experts(
    experts: Experts,
    x: Tensor,
    index_NK: Tensor,
    weight_NK: Tensor | None = None,
    *,
    shift: Shift | None = None,
    drop: bool = True,
) -> Tensor:
    """sum_k w[n, k] FFN_{index[n, k]}(x[n]) (N, D) for x of shape (N, D), or of x[n, k] for x of shape (N, K, D).

    Without weights the answers themselves (N, K, D). An index of -1 is no expert: zeros. Without `drop` the experts leave out
    their dropout. A `shift` is for x of shape (N, D).
    """
    dropout = experts.dropout if experts.training and drop else 0.0
    return (each_expert if x.device.type == "cpu" else grouped)(experts, x, index_NK, weight_NK, dropout, shift)


def combine(y_NKD: Tensor, weight_NK: Tensor) -> Tensor:
    """sum_k w_k y_k (N, D)."""
    return (weight_NK[:, None] @ y_NKD).squeeze(1)


def each_expert(
    experts: Experts, x: Tensor, index_NK: Tensor, weight_NK: Tensor | None, dropout: float, shift: Shift | None = None
) -> Tensor:
    """`apply_experts` one expert after another: the fastest way on a few cores."""
    parameters = experts.w1_EDH, experts.b1_EH, experts.w2_EHD, experts.b2_ED
    table_CD, code_N = shift or (None, None)
    inputs = x.reshape(-1, x.shape[-1]), *parameters, weight_NK, table_CD
    learns = torch.is_grad_enabled() and any(one is not None and one.requires_grad for one in inputs)
    return _EachExpert.apply(*inputs, code_N, index_NK, dropout, experts.activation, learns)


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
        table_CD: Tensor | None,
        code_N: Tensor | None,
        index_NK: Tensor,
        dropout: float,
        activation: str,
        learns: bool,
    ) -> Tensor:
        tokens, slots = index_NK.shape
        # First assignments of all tokens first, last ones last, so that an expert's rows end with those that are shifted.
        index_A = index_NK.T.reshape(-1)
        nowhere, *rows = torch.bincount(index_A + 1, minlength=len(w1_EDH) + 1).tolist()
        _, *tails = torch.bincount(index_NK[:, -1] + 1, minlength=len(w1_EDH) + 1).tolist()
        order_R = torch.argsort(index_A, stable=True)[nowhere:]
        token_R = order_R % tokens
        source_R = token_R * slots + order_R // tokens  # the place in (N, K)
        row_R = token_R if len(x_MD) == tokens else source_R
        code_R = None if code_N is None else code_N[token_R]
        # With weights a token's answers are summed, without them each assignment has a place of its own.
        to_R, weight_R1 = (source_R, None) if weight_NK is None else (token_R, weight_NK.reshape(-1, 1)[source_R])
        y_MD, kept = x_MD.new_zeros(tokens * slots if weight_NK is None else tokens, x_MD.shape[1]), []
        parts = (part.split(rows) for part in (row_R, to_R))
        parts_or_none = (_split(part, rows) for part in (code_R, weight_R1))
        weights = (one.unbind() for one in (w1_EDH, b1_EH, w2_EHD, b2_ED))
        for row, to, code, weight, w1, b1, w2, b2, tail in zip(*parts, *parts_or_none, *weights, tails, strict=True):
            h, mask = torch.addmm(b1, _read(x_MD, row, table_CD, code, tail), w1), None
            if len(row):
                a = getattr(F, activation)(h)
                if dropout:
                    a, mask = torch.native_dropout(a, dropout, True)
                y = torch.addmm(b2, a, w2)
                y_MD.index_add_(0, to, y if weight is None else y.mul_(weight))
            if learns:
                kept.append((h, mask))
        ctx.save_for_backward(x_MD, w1_EDH, w2_EHD, b2_ED, table_CD, code_R, weight_R1, row_R, to_R, source_R)
        # Not saved as those are, which live until the whole backward pass is done: half of the memory that a pass takes.
        ctx.kept = kept
        ctx.rows, ctx.tails, ctx.dropout, ctx.activation = rows, tails, dropout, activation
        ctx.shape = index_NK.shape
        return y_MD.view(tokens, slots, -1) if weight_NK is None else y_MD

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x_MD, w1_EDH, w2_EHD, b2_ED, table_CD, code_R, weight_R1, row_R, to_R, source_R = ctx.saved_tensors
        kept, ctx.kept, scale = ctx.kept, None, 1 / (1 - ctx.dropout)
        if kept is None:
            raise RuntimeError("backward a second time through the same experts, whose hidden states are gone")
        wants_x, *wants, wants_weight, wants_table = ctx.needs_input_grad[:7]
        rows, dw1_EDH, dw2_EHD = ctx.rows, torch.empty_like(w1_EDH), torch.empty_like(w2_EHD)
        db1_EH, db2_ED = (one.new_empty(one.shape[::2]) for one in (w1_EDH, w2_EHD))
        dx_MD = torch.zeros_like(x_MD) if wants_x else None
        dtable_CD = torch.zeros_like(table_CD) if wants_table else None
        dweight_R, grad_MD = grad.new_empty(len(to_R)), grad.reshape(-1, grad.shape[-1])
        parts = (
            (part.split(rows) for part in (row_R, to_R, dweight_R)),
            (_split(part, rows) for part in (code_R, weight_R1)),
            (one.unbind() for one in (w1_EDH, w2_EHD, b2_ED, dw1_EDH, db1_EH, dw2_EHD, db2_ED)),
            (ctx.tails,),
        )
        for row, to, dweight, code, weight, w1, w2, b2, dw1, db1, dw2, db2, tail in zip(*chain(*parts), strict=True):
            h, mask = kept.pop(0)
            if not len(row):
                for one in (dw1, db1, dw2, db2):
                    one.zero_()
                continue
            dy = grad_MD.index_select(0, to)
            dh = dy @ w2.T
            if wants_weight:
                torch.mv(dy, b2, out=dweight)
            if weight is not None:
                dy.mul_(weight)
            if wants_weight or any(wants):
                # Again, rather than kept: while h is in the cache this takes no longer than to fetch it.
                a = getattr(F, ctx.activation)(h)
                if mask is not None:
                    a = torch.ops.aten.native_dropout_backward(a, mask, scale)
            if any(wants):
                torch.mm(a.T, dy, out=dw2)
                torch.sum(dy, 0, out=db2)
            if wants_weight:
                # The gradient times the answer a w2 + b2, which is not kept.
                dweight.add_(a.mul_(dh).sum(1))
            if weight is not None:
                dh.mul_(weight)
            if mask is not None:
                dh = torch.ops.aten.native_dropout_backward(dh, mask, scale)
            _DERIVATIVES[ctx.activation](dh, h)
            if any(wants):
                torch.mm(_read(x_MD, row, table_CD, code, tail).T, dh, out=dw1)
                torch.sum(dh, 0, out=db1)
            if wants_x or wants_table:
                dx = dh @ w1.T
            if wants_table and tail:
                dtable_CD.index_add_(0, code[-tail:], dx[-tail:])
            if wants_x:
                dx_MD.index_add_(0, row, dx)
        dexperts = (dw1_EDH, db1_EH, dw2_EHD, db2_ED) if any(wants) else (None,) * 4
        dweight_NK = None
        if wants_weight:
            tokens, slots = ctx.shape
            dweight_NK = dweight_R.new_zeros(tokens * slots).index_copy_(0, source_R, dweight_R).view(tokens, slots)
        return dx_MD, *dexperts, dweight_NK, dtable_CD, None, None, None, None, None


def _split(part: Tensor | None, rows: list[int]) -> Iterable[Tensor | None]:
    return repeat(None, len(rows)) if part is None else part.split(rows)


def _read(x_MD: Tensor, row: Tensor, table_CD: Tensor | None, code: Tensor | None, tail: int) -> Tensor:
    """What an expert reads: these rows, the last `tail` of them shifted."""
    x = x_MD.index_select(0, row)
    if table_CD is not None and tail:
        x[-tail:] += table_CD.index_select(0, code[-tail:])
    return x


def grouped(
    experts: Experts, x: Tensor, index_NK: Tensor, weight_NK: Tensor | None, dropout: float, shift: Shift | None = None
) -> Tensor:
    """`apply_experts` by products of all experts at once, without waiting for the GPU to say how many rows each has.

    So an assignment to no expert costs as much as another: the first expert answers, and its answer counts nothing.
    """
    kind = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
    w1_EDH, b1_EH, w2_EHD, b2_ED = (one.to(kind) for one in (experts.w1_EDH, experts.b1_EH, experts.w2_EHD, experts.b2_ED))
    tokens, slots = index_NK.shape
    if shift is not None:
        shifted_ND = x + F.embedding(shift.code_N, shift.table_CD)
        x = torch.cat([x[:, None].expand(-1, slots - 1, -1), shifted_ND[:, None]], 1)
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
