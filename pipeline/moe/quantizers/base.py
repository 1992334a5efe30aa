"""What every quantizer returns, and what all share: when codes start, come back to life, are repaired and freeze.

Shapes: N tokens, D width, C codes.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from pipeline import ranks


class Settings(Protocol):
    """What a quantizer reads of its method's params."""

    codes: int
    dead_share: float
    code_width: int


class Quantized(NamedTuple):
    """A quantizer's answer for N tokens.

    `value()` is the quantized token in the model's width (N, D), without a straight-through estimator; a function, since most do
    not ask for it, and true until the codes move. `weight_N1` is exactly 1 and carries the task's gradient to the codes; None if
    the variant has none. `embedding_ND` is what `input: residual` adds to the token where the variant says so itself (`embeds`),
    else None. `error` is the mean of (x - v)^2 over elements, without gradient; `losses` are raw values, of `codebook` and
    `commitment` those there are. `scores_NC` are the scores of all codes, the highest that of `code_N`; None if the variant
    compares no codes.
    """

    code_N: Tensor
    value: Callable[[], Tensor]
    weight_N1: Tensor | None
    embedding_ND: Tensor | None
    error: Tensor
    losses: dict[str, Tensor]
    scores_NC: Tensor | None = None


class Quantizer(nn.Module):
    """Codes that start on the first training batch, and of which those that die come back while training.

    Processes that share a step keep the same codes, by the tokens of all of them.

    Dead is a code whose moving share of the tokens falls under `dead_share` / C. All state lives in parameters and
    buffers. A variant defines `nearest`, `_quantize`, `_start`, `_revive` and `_repair`.
    """

    embeds = False
    decay = 0.99  # of moving averages, per step

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.codes, self.dead_share = settings.codes, settings.dead_share
        self.register_buffer("share_C", torch.full((self.codes,), 1 / self.codes))
        self.register_buffer("started", torch.tensor(False))
        self.register_buffer("frozen", torch.tensor(False))
        self.register_load_state_dict_post_hook(_as_loaded)
        self._forget()

    def forward(self, x_ND: Tensor) -> Quantized:
        if self._flags is None:
            self._flags = bool(self.started), bool(self.frozen)
        started, frozen = self._flags
        learning = self.training and not frozen
        if learning:
            if not started:
                self.start(x_ND)
            if self._some_dead is None:
                self._some_dead = _Later(self._dead().any())
            if self._some_dead:
                with torch.no_grad():
                    dead_C = self._dead()
                    self._revive(ranks.gathered(x_ND, ranks.GATHERED), dead_C)
                    self.share_C[dead_C] = 1 / self.codes
                    ranks.agree(self)
        quantized = self._quantize(x_ND)
        if learning:
            count_C = ranks.total(torch.bincount(quantized.code_N, minlength=self.codes))
            self.share_C.lerp_(count_C.to(self.share_C.dtype) / count_C.sum(), 1 - self.decay)
            with torch.no_grad():
                self._follow(x_ND, quantized.code_N, count_C)
            self._some_dead = _Later(self._dead().any())
        return quantized

    @torch.no_grad()
    def start(self, x_ND: Tensor) -> None:
        """(Re)place all codes by these tokens (N >= C; fewer are repeated)."""
        self._start(ranks.gathered(x_ND, ranks.GATHERED))
        self.share_C.fill_(1 / self.codes)
        self.started.fill_(True)
        ranks.agree(self)
        self._forget()

    @torch.no_grad()
    def repair(self, x_ND: Tensor) -> None:
        """Give tokens to the codes that none of these tokens uses; an unstarted quantizer is started.

        Codes in use stay, since experts have learnt what they stand for.
        """
        if not self.started:
            self.start(x_ND)
            return
        used_C = torch.bincount(self.nearest(x_ND), minlength=self.codes) > 0
        if not used_C.all():
            self._repair(x_ND, used_C)
            self.share_C.fill_(1 / self.codes)
            self._forget()

    def freeze(self) -> None:
        """No code moves any more: neither by gradient, nor by averages, nor by re-seeding. Saved with the model."""
        self.frozen.fill_(True)
        self.requires_grad_(False)
        self._forget()

    def _dead(self) -> Tensor:
        return self.share_C < self.dead_share / self.codes

    def _forget(self) -> None:
        """Buffers have changed: look into them again. To do so in every step would have the host wait for a GPU each time."""
        self._flags: tuple[bool, bool] | None = None  # started, frozen
        self._some_dead: _Later | None = None

    def _follow(self, x_ND: Tensor, code_N: Tensor, count_C: Tensor) -> None:
        """Move codes that no gradient moves, given how many tokens each code has, those of all ranks."""


@contextmanager
def watched(quantizers: Sequence[nn.Module]) -> Iterator[list[list[Tensor]]]:
    """For each quantizer the squared distances (N,) of tokens to their codes, in the space of the tokens, of every call within.

    A quantizer that gives no value of a code (`vqmoe_released`) gives its scores, which are distances less those to the origin.
    """
    seen: list[list[Tensor]] = [[] for _ in quantizers]

    def see(place: int, x_ND: Tensor, answer: Quantized | Tensor) -> None:
        value_ND = answer.value() if isinstance(answer, Quantized) else None
        distance_N = x_ND.square().sum(1) - answer.amax(1) if value_ND is None else (x_ND - value_ND).square().sum(1)
        seen[place].append(distance_N.detach().cpu())

    hooks = [
        quantizer.register_forward_hook(lambda _, inputs, answer, place=place: see(place, inputs[0], answer))
        for place, quantizer in enumerate(quantizers)
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


class _Later:
    """A flag whose way from a GPU to the host has begun: who asks for it a step later need not wait."""

    def __init__(self, flag: Tensor) -> None:
        self.flag, self.there = flag, None
        if flag.is_cuda:
            self.flag = torch.empty((), dtype=torch.bool, pin_memory=True).copy_(flag, non_blocking=True)
            self.there = torch.cuda.Event()
            self.there.record()

    def __bool__(self) -> bool:
        if self.there is not None:
            self.there.synchronize()
        return bool(self.flag)


def _as_loaded(quantizer: Quantizer, _: object) -> None:
    quantizer._forget()
    # Whether a parameter wants a gradient is not part of a model's state.
    if quantizer.frozen:
        quantizer.freeze()
