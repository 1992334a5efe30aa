"""Random small layers, and the comparison of the fast version with the loops of tests/moe/reference.py."""

import copy
from collections.abc import Callable
from typing import NamedTuple

import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pipeline import config
from pipeline.moe.layer import SETTINGS, build_layer
from pipeline.moe.routers.base import Mode, Sizes
from tests.conftest import REPOSITORY
from tests.moe.reference import Naive

SECTIONS = config.load(REPOSITORY / "params.yaml", SETTINGS).methods | {
    "vmoe": SETTINGS["vmoe"](top_k=2, balance=0.01, capacity=1.05, priority="batch"),
    "softmoe": SETTINGS["softmoe"](slots=2),
}
WIDTH, VOCABULARY = 4, 7


class Case(NamedTuple):
    """A layer's sizes, the seed of its weights and tokens, and whether all tokens are the same (and so is their expert)."""

    tokens: int
    experts: int
    top_k: int
    same: bool
    seed: int

    def layer(self, method: str, **changes) -> nn.Module:
        """A layer with random weights and the settings of params.yaml but `changes`, in evaluation mode."""
        torch.manual_seed(self.seed)
        section = SECTIONS[method].model_dump()
        if "top_k" in section:
            section["top_k"] = self.top_k
        made = build_layer(method, SETTINGS[method](**(section | changes)), Sizes(WIDTH, self.experts, 8, VOCABULARY, 0.0))
        for parameter in made.parameters():
            nn.init.normal_(parameter, std=0.5)
        return made.eval()

    def inputs(self) -> tuple[Tensor, Tensor]:
        """Tokens (N, D) and their ids (N,)."""
        rows = 1 if self.same else self.tokens
        x_ND, id_N = torch.randn(rows, WIDTH), torch.randint(VOCABULARY, (rows,))
        return x_ND.repeat(self.tokens // rows, 1), id_N.repeat(self.tokens // rows)


CASE = Case(tokens=12, experts=4, top_k=2, same=False, seed=0)
EDGES = {
    "one token": Case(1, 5, 2, False, 0),
    "all experts": Case(8, 5, 5, False, 500),
    "all tokens to one expert": Case(8, 5, 1, True, 999),
}


@st.composite
def cases(draw) -> Case:
    experts = draw(st.integers(1, 5))
    return Case(draw(st.integers(1, 8)), experts, draw(st.integers(1, experts)), draw(st.booleans()), draw(st.integers(0, 999)))


def over_cases(test: Callable) -> Callable:
    """Run a test of one case, its last argument, on random cases and on those at the edges.

    They are the same in every run: near-ties, which float32 and float64 may break differently, do not come and go.
    """
    for edge in EDGES.values():
        test = example(edge)(test)
    return settings(max_examples=15, deadline=None, derandomize=True)(given(cases())(test))


def assert_matches(
    made: nn.Module,
    mode: Mode,
    naive: Callable[..., Naive],
    x_ND: Tensor,
    id_N: Tensor | None = None,
    length: int | None = None,
) -> None:
    """Outputs, losses, experts and all gradients of the float32 layer against the float64 loops.

    The gradients are those of a random combination of the outputs and the losses.
    """
    made.zero_grad()
    exact = copy.deepcopy(made).double()
    fast_x, exact_x = x_ND.clone().requires_grad_(), x_ND.double().requires_grad_()
    fast, slow = made(fast_x, mode, id_N, length), naive(exact, exact_x, id_N)
    torch.testing.assert_close(fast.y_ND.double(), slow.y_ND, atol=1e-4, rtol=1e-3)
    assert [sorted(row) for row in fast.index_NK.tolist()] == [sorted(row) for row in slow.index]
    assert fast.losses.keys() == slow.losses.keys()
    upstream, total, exact_total = torch.randn_like(slow.y_ND), 0.0, 0.0
    for name, loss in fast.losses.items():
        torch.testing.assert_close(
            loss.value.double(), slow.losses[name], atol=1e-5, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )
        factor = torch.randn(()).item()
        total, exact_total = total + factor * loss.value, exact_total + factor * slow.losses[name]
    (total + (fast.y_ND * upstream.float()).sum()).backward()
    (exact_total + (slow.y_ND * upstream).sum()).backward()
    assert_same_gradients(made, fast_x, exact, exact_x)


def assert_same_gradients(made: nn.Module, fast_x: Tensor, exact: nn.Module, exact_x: Tensor) -> None:
    """Gradients of the tokens and of all parameters, float32 against float64."""
    torch.testing.assert_close(fast_x.grad.double(), exact_x.grad, atol=1e-3, rtol=1e-2)
    for (name, one), other in zip(made.named_parameters(), exact.parameters(), strict=True):
        if other.grad is None:
            assert one.grad is None or not one.grad.any(), name
        else:
            torch.testing.assert_close(
                one.grad.double(), other.grad, atol=1e-3, rtol=1e-2, msg=lambda text, name=name: f"{name}: {text}"
            )
