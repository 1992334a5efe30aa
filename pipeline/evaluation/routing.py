"""Whether experts have become alike, and the states that reach them few-dimensional (METHOD section 5).

Shapes: S sequences, B sequences of a batch, T positions, N tokens, D width, E experts, K assignments per token.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from pipeline.models.backbone import Backbone, Hidden
from pipeline.moe import stats

BATCH = 32
STATES = 16_384  # tokens whose states are ranked: the rank of few is bounded by their number
OUTPUTS = 1024  # of these, tokens that all experts read


@torch.no_grad()
def collapse(model: Backbone, run: Callable[[Tensor], Hidden], valid_ST: Tensor) -> list[dict[str, float]]:
    """Per mixture layer: `output_cosine` and `cka` of its experts, and `effective_rank` of the states by expert.

    On evenly spaced tokens of sequences, of which `run` passes some rows through the model; where `valid_ST` is false there is no
    token. All experts read the layer's input, whatever
    the discrete path of VQMoE reads, and answer by themselves, without what `vqmoe_released` has around them. A layer with one
    expert has only the effective rank, of all states.
    """
    chosen_ST = torch.zeros_like(valid_ST)
    chosen_ST.view(-1)[_spaced(valid_ST.flatten().nonzero()[:, 0], STATES)] = True
    seen: list[list[tuple[Tensor, Tensor]]] = [[] for _ in model.moe_layers]
    for rows in torch.arange(len(valid_ST)).split(BATCH):
        chosen_N = chosen_ST[rows][valid_ST[rows]]
        answers = _assignments(model, run, rows)
        for kept, (x_ND, index_NK) in zip(seen, answers, strict=True):
            kept.append((x_ND.cpu()[chosen_N], index_NK.cpu()[chosen_N]))
    result = []
    for layer, kept in zip(model.moe_layers, seen, strict=True):
        x_ND, index_NK = (torch.cat(parts) for parts in zip(*kept, strict=True))
        experts = layer.experts.count
        rank = stats.effective_rank_by_expert(x_ND, index_NK, experts)
        row = {} if rank is None else {"effective_rank": rank}
        if experts > 1:
            x_ND = _spaced(x_ND, OUTPUTS)
            y_END = layer.experts(x_ND.to(model.device).expand(experts, -1, -1)).cpu()
            row = {"output_cosine": stats.output_cosine(y_END), "cka": stats.cka(y_END)} | row
        result.append(row)
    return result


def _assignments(model: Backbone, run: Callable[[Tensor], Hidden], rows_B: Tensor) -> list[tuple[Tensor, Tensor]]:
    """What each mixture layer read (N, D), and the experts it chose (N, K)."""
    read: list[Tensor] = []
    hooks = [layer.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0])) for layer in model.moe_layers]
    try:
        hidden = run(rows_B)
    finally:
        for hook in hooks:
            hook.remove()
    return [(x_ND, output.index_NK) for x_ND, output in zip(read, hidden.layers, strict=True)]


def _spaced(rows: Tensor, count: int) -> Tensor:
    """`count` evenly spaced rows, or all if there are no more."""
    count = min(count, len(rows))
    return rows[torch.arange(count) * len(rows) // max(1, count)]
