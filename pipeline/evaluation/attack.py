"""Adversarial substitutions: which symbols to change so that a model's loss rises most (HotFlip, Ebrahimi et al. 2018,
arXiv 1712.06751).

The gradient of the loss with respect to the embeddings of a text ranks all substitutions to first order; the most promising
are tried. A query is a pass of one sequence through the model, with a gradient or without.

Shapes: S sequences, B of them in one pass, A still attacked, T positions, C symbols to put in, K edits, J blocks, D width.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pipeline.errors import Failure, UsageError

BATCH = 32

# From tokens (B, T), and which of the S sequences they are (B,), to the loss of each (B,).
Loss = Callable[[Tensor, Tensor], Tensor]


class Edits(NamedTuple):
    """Substitutions in the order they were made: position and new id (S, K), -1 where the search had ended; queries (S,)."""

    position_SK: Tensor
    symbol_SK: Tensor
    queries_S: Tensor


def greedy(
    loss: Loss,
    embedding: nn.Embedding,
    tokens_ST: Tensor,
    changeable_ST: Tensor,
    symbols_C: Tensor,
    most_S: Tensor,
    queries: int,
    candidates: int = 4,
) -> Edits:
    """At most `most` substitutions in each sequence, each at another changeable position, in at most `queries` queries.

    A round takes a gradient (one query), which ranks the changeable positions that are left, each with its best symbol. The
    first `candidates` of these substitutions are tried alone (one query each), and the best is kept if the loss rises. Where
    more are wanted than the budget has rounds, blocks are tried in their place: the first few of the ranking together, the next
    few together, and so on; as few in a block as the budget allows. If none raises the loss, the next blocks are half as large;
    the search ends when no single substitution raises it. So the loss rises in every round that is kept.

    The model has to be in eval mode; `loss` reads its embeddings through `embedding`, once. Raises Failure if a loss or its
    gradient is not finite, UsageError if the budget is less than a round.
    """
    if queries < 1 + candidates:
        raise UsageError(f"attack: {queries} queries are less than a round of {1 + candidates}; allow more")
    rounds, longest = queries // (1 + candidates), int(most_S.max())
    parts = []
    for rows_B in torch.arange(len(tokens_ST), device=tokens_ST.device).split(BATCH):
        tokens_BT, most_B = tokens_ST[rows_B], most_S[rows_B]
        # A position with the only symbol there is has no other.
        left_BT = changeable_ST[rows_B] & ((tokens_BT != symbols_C.min()) | (tokens_BT != symbols_C.max()))
        edits = Edits(*(tokens_BT.new_full((len(rows_B), longest), -1) for _ in range(2)), torch.zeros_like(rows_B))
        size_B, made_B = -(-most_B // rounds), torch.zeros_like(most_B)
        for _ in range(rounds):
            size_B = size_B.minimum(most_B - made_B)
            active_A = torch.nonzero((size_B > 0) & left_BT.any(1)).flatten()
            if not len(active_A):
                break
            rows_A, tokens_AT, size_A1 = rows_B[active_A], tokens_BT[active_A], size_B[active_A, None]
            loss_A, gain_AT, symbol_AT = _estimate(loss, embedding, tokens_AT, rows_A, symbols_C)
            left_AT = left_BT[active_A]
            # A stable sort: of positions that are as good the lower comes first.
            rank_AT = gain_AT.masked_fill(~left_AT, -torch.inf).argsort(dim=1, descending=True, stable=True).argsort(1)
            block_AT = (rank_AT // size_A1).masked_fill(~left_AT, -1)
            chosen_AJT = block_AT[:, None] == torch.arange(candidates, device=block_AT.device)[:, None]
            tried_AJ = chosen_AJT.any(2)
            text_AJT = torch.where(chosen_AJT, symbol_AT[:, None], tokens_AT[:, None])
            tried = _losses(loss, text_AJT[tried_AJ], rows_A[:, None].expand_as(tried_AJ)[tried_AJ])
            best = torch.full_like(tried_AJ, -torch.inf, dtype=tried.dtype).masked_scatter(tried_AJ, tried).max(1)
            edits.queries_S[active_A] += 1 + tried_AJ.sum(1)
            raised_A = best.values > loss_A
            kept_AT = raised_A[:, None] & (block_AT == best.indices[:, None])
            row, position = torch.nonzero(kept_AT, as_tuple=True)
            place = made_B[active_A][row] + (rank_AT % size_A1)[kept_AT]
            edits.position_SK[active_A[row], place] = position
            edits.symbol_SK[active_A[row], place] = symbol_AT[kept_AT]
            tokens_BT[active_A] = torch.where(kept_AT, symbol_AT, tokens_AT)
            left_BT[active_A] &= ~kept_AT
            made_B[active_A] += kept_AT.sum(1)
            size_B[active_A] = torch.where(raised_A, size_A1[:, 0], size_A1[:, 0] // 2)
        parts.append(edits)
    return Edits(*(torch.cat(part) for part in zip(*parts, strict=True)))


def apply(tokens_ST: Tensor, edits: Edits, count_S: Tensor) -> Tensor:
    """The sequences (S, T) with the first `count` of their edits, or all if there are fewer."""
    order_K = torch.arange(edits.position_SK.shape[1], device=tokens_ST.device)
    made_SK = (edits.position_SK >= 0) & (order_K < count_S[:, None])
    edited_ST = tokens_ST.clone()
    edited_ST[torch.nonzero(made_SK)[:, 0], edits.position_SK[made_SK]] = edits.symbol_SK[made_SK]
    return edited_ST


def _estimate(
    loss: Loss, embedding: nn.Embedding, tokens_BT: Tensor, rows_B: Tensor, symbols_C: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss (B,), what it gains to first order by the best other symbol at each position, and that symbol (B, T)."""
    outputs = []

    def leaf(module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
        outputs.append(output.detach().requires_grad_())
        return outputs[-1]

    hook = embedding.register_forward_hook(leaf)
    try:
        with torch.enable_grad():
            loss_B = loss(tokens_BT, rows_B)
            (x_BTD,) = outputs
            (gradient_BTD,) = torch.autograd.grad(loss_B.sum(), x_BTD)
    finally:
        hook.remove()
    _check(loss_B, "loss")
    _check(gradient_BTD, "gradient")
    symbol_CD = embedding.weight.detach()[symbols_C]
    gains, symbols = [], []
    # One sequence at a time: (T, C) is large for a vocabulary of words.
    for tokens_T, gradient_TD, x_TD in zip(tokens_BT, gradient_BTD, x_BTD.detach(), strict=True):
        gain_TC = gradient_TD @ symbol_CD.T - (gradient_TD * x_TD).sum(1, keepdim=True)
        gain_T, index_T = gain_TC.masked_fill(tokens_T[:, None] == symbols_C, -torch.inf).max(1)
        gains.append(gain_T)
        symbols.append(symbols_C[index_T])
    return loss_B.detach(), torch.stack(gains), torch.stack(symbols)


@torch.no_grad()
def _losses(loss: Loss, tokens_NT: Tensor, rows_N: Tensor) -> Tensor:
    """The losses (N,) of any number of texts."""
    batches = zip(tokens_NT.split(BATCH), rows_N.split(BATCH), strict=True)
    loss_N = torch.cat([loss(tokens_BT, rows_B) for tokens_BT, rows_B in batches])
    return _check(loss_N, "loss")


def _check(value: Tensor, name: str) -> Tensor:
    if not value.isfinite().all():
        raise Failure(f"the {name} under attack is not finite; train the model again with a lower learning rate")
    return value
