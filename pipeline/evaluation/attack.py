"""Adversarial substitutions: which symbols to change, within a budget of queries, so that a model's loss rises.

A random search over positions whose symbols come from the gradient: positions are tried in a random order, each with the symbol
that raises the loss most to first order (HotFlip, Ebrahimi et al. 2018, arXiv 1712.06751), and what raises the loss is kept.
HotFlip ranks positions by the same estimate; here it does not, since a substitution is no small step and the estimate says next
to nothing about where it hurts. Where it says nothing about symbols either, what is left is blind search with the same budget.
A query is a pass of one sequence through the model, with a gradient or without.

Shapes: S sequences, B of them in one pass, T positions, C symbols to put in, K edits, D width.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.errors import Failure, UsageError

BATCH = 32

# From tokens (B, T), and which of the S sequences they are (B,), to the loss of each (B,).
Loss = Callable[[Tensor, Tensor], Tensor]


class Edits(NamedTuple):
    """Substitutions, those that raised the loss most first: position and new id (S, K), -1 after the last; queries (S,)."""

    position_SK: Tensor
    symbol_SK: Tensor
    queries_S: Tensor

    def cpu(self) -> "Edits":
        return Edits(*(one.cpu() for one in self))


def greedy(
    loss: Loss,
    embedding: nn.Embedding,
    tokens_ST: Tensor,
    changeable_ST: Tensor,
    symbols_C: Tensor,
    most_S: Tensor,
    queries: int,
    seed: int = 0,
) -> Edits:
    """At most `most` substitutions in each sequence, each at another changeable position, found in `queries` queries.

    The first query is a gradient at the clean text; each further one tries the next position. Its substitution joins those made
    before, or, once there are `most`, takes the place of the one that raised the loss least, and is kept if the loss rises. When
    all positions have been tried, they are tried again with random symbols. Where the budget has fewer than two tries for each
    of `most` substitutions, several positions are tried together, as few as allow two.

    `seed`, the sequence's row and the round decide the draws, never the model: the same positions are tried on every model. All
    of the budget is spent, or none where nothing may be changed. The loss of all edits together was seen; that of the first few
    was not, as the edits' order is by what each added when it was made.

    The model has to be in eval mode; `loss` reads its embeddings through `embedding`, once. Raises Failure if a loss or its
    gradient is not finite, UsageError if the budget has less than two tries.
    """
    if queries < 3:
        raise UsageError(f"attack: {queries} queries are less than a gradient and two tries; allow more")
    symbols_C = symbols_C.unique()
    # A position with the only symbol there is has no other.
    changeable_ST = changeable_ST & ((tokens_ST != symbols_C[0]) | (len(symbols_C) > 1))
    attacked_S = (most_S > 0) & changeable_ST.any(1)
    position_SK, symbol_SK = (tokens_ST.new_full((len(tokens_ST), int(most_S.max())), -1) for _ in range(2))
    for rows_B in torch.nonzero(attacked_S).flatten().split(BATCH):
        clean_BT, changeable_BT, most_B1 = tokens_ST[rows_B], changeable_ST[rows_B], most_S[rows_B, None]
        draws = [np.random.default_rng((seed, row)) for row in rows_B.tolist()]
        key_BT = torch.from_numpy(np.stack([draw.random(clean_BT.shape[1]) for draw in draws])).to(clean_BT.device)
        turn_BT, count_B1 = _rank(key_BT, changeable_BT), changeable_BT.sum(1, keepdim=True)
        size_B1 = -(-2 * most_B1 // (queries - 1))
        loss_B, best_BT = _steepest(loss, embedding, clean_BT, rows_B, symbols_C)
        text_BT, made_BT, rise_BT = clean_BT, torch.zeros_like(changeable_BT), torch.zeros_like(key_BT)
        for tries in range(queries - 1):
            start_B1 = tries * size_B1
            ahead_BT = (turn_BT - start_B1) % count_B1
            block_BT = changeable_BT & (ahead_BT < size_B1)
            new_BT = torch.where(start_B1 + ahead_BT < count_B1, best_BT, _other(clean_BT, symbols_C, draws))
            stay_BT = made_BT & ~block_BT
            stay_BT &= _rank(rise_BT, stay_BT) < most_B1 - block_BT.sum(1, keepdim=True)
            tried_BT = torch.where(block_BT, new_BT, torch.where(stay_BT, text_BT, clean_BT))
            with torch.no_grad():
                tried_B = finite(loss(tried_BT, rows_B), "loss")
            # What the block adds to the edits that stay: the loss without those that make way is not known, but their rise is.
            rise_B = tried_B - loss_B + (rise_BT * (made_BT & ~stay_BT)).sum(1)
            block_rise_BT = torch.where(block_BT, (rise_B / block_BT.sum(1))[:, None], rise_BT)
            better_B = tried_B > loss_B
            better_B1 = better_B[:, None]
            made_BT = torch.where(better_B1, block_BT | stay_BT, made_BT)
            rise_BT = torch.where(better_B1, block_rise_BT, rise_BT)
            text_BT = torch.where(better_B1, tried_BT, text_BT)
            loss_B = torch.where(better_B, tried_B, loss_B)
        row, position = torch.nonzero(made_BT, as_tuple=True)
        place = _rank(rise_BT, made_BT)[row, position]
        position_SK[rows_B[row], place] = position
        symbol_SK[rows_B[row], place] = text_BT[row, position]
    return Edits(position_SK, symbol_SK, queries * attacked_S.long())


def apply(tokens_ST: Tensor, edits: Edits, count_S: Tensor) -> Tensor:
    """The sequences (S, T) with the first `count` of their edits, or all if there are fewer."""
    order_K = torch.arange(edits.position_SK.shape[1], device=tokens_ST.device)
    made_SK = (edits.position_SK >= 0) & (order_K < count_S[:, None])
    edited_ST = tokens_ST.clone()
    edited_ST[torch.nonzero(made_SK)[:, 0], edits.position_SK[made_SK]] = edits.symbol_SK[made_SK]
    return edited_ST


def _rank(value_BT: Tensor, among_BT: Tensor) -> Tensor:
    """The place (B, T) of each value among those chosen, the largest first; of equal ones the lower position."""
    value_BT = value_BT.masked_fill(~among_BT, -torch.inf)
    return value_BT.argsort(dim=1, descending=True, stable=True).argsort(1)


def _other(tokens_BT: Tensor, symbols_C: Tensor, draws: list[np.random.Generator]) -> Tensor:
    """A random other symbol (B, T) for each token."""
    count = len(symbols_C)
    # The place of the old symbol among the others, plus 1 to count-1 steps round them, is any other symbol alike.
    steps_BT = np.stack([draw.integers(1, max(count, 2), tokens_BT.shape[1]) for draw in draws])
    return symbols_C[(torch.searchsorted(symbols_C, tokens_BT) + torch.from_numpy(steps_BT).to(tokens_BT.device)) % count]


def _steepest(loss: Loss, embedding: nn.Embedding, tokens_BT: Tensor, rows_B: Tensor, symbols_C: Tensor) -> tuple[Tensor, Tensor]:
    """The loss (B,), and the other symbol at each position by which it gains most to first order (B, T)."""
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
    finite(loss_B, "loss")
    finite(gradient_BTD, "gradient")
    symbol_CD = embedding.weight.detach()[symbols_C]
    # One sequence at a time: (T, C) is large for a vocabulary of words.
    best = [
        (gradient_TD @ symbol_CD.T).masked_fill(tokens_T[:, None] == symbols_C, -torch.inf).argmax(1)
        for tokens_T, gradient_TD in zip(tokens_BT, gradient_BTD, strict=True)
    ]
    return loss_B.detach(), symbols_C[torch.stack(best)]


def finite(value: Tensor, name: str) -> Tensor:
    """The value. Raises Failure if it is not finite."""
    if not value.isfinite().all():
        raise Failure(f"the {name} under attack is not finite; train the model again with a lower learning rate")
    return value
