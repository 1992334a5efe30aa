import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from pipeline.moe.layer import SETTINGS, build_layer
from tests.moe import reference

VQ = {
    "top_k": 1,
    "balance": 0.01,
    "quantizer": "nearest",
    "codes": 8,
    "code_width": 3,
    "input": "residual",
    "blend": 0.05,
    "combine": "sum",
    "drop_routed": 0.0,
    "beta": 0.08,
    "commitment": 0.25,
    "dead_share": 0.1,
}


def layer(method: str, experts: int = 4, width: int = 8, hidden: int = 12, **changes):
    base = VQ if method == "vqmoe" else {"top_k": 2, "balance": 0.01}
    made = build_layer(method, SETTINGS[method](**(base | changes)), width=width, experts=experts, hidden=hidden, dropout=0.0)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return made.eval()


def assert_matches(made, mode: str, naive, x_ND: torch.Tensor) -> None:
    """Outputs and all gradients of the float32 layer against the float64 loops."""
    exact = copy.deepcopy(made).double()
    fast_x, exact_x = x_ND.clone().requires_grad_(), x_ND.double().requires_grad_()
    fast, slow = made(fast_x, mode).y_ND, naive(exact, exact_x)
    torch.testing.assert_close(fast.double(), slow, atol=1e-4, rtol=1e-3)
    upstream = torch.randn_like(slow)
    fast.backward(upstream.float())
    slow.backward(upstream)
    torch.testing.assert_close(fast_x.grad.double(), exact_x.grad, atol=1e-3, rtol=1e-2)
    for (name, one), other in zip(made.named_parameters(), exact.parameters(), strict=True):
        if other.grad is None:
            assert one.grad is None or not one.grad.any(), name
        else:
            torch.testing.assert_close(
                one.grad.double(), other.grad, atol=1e-3, rtol=1e-2, msg=lambda text, name=name: f"{name}: {text}"
            )


@settings(max_examples=25, deadline=None)
@given(tokens=st.integers(1, 20), experts=st.integers(1, 6), slots=st.integers(1, 6), seed=st.integers(0, 1000))
def test_sparse_layer_matches_the_loops(tokens, experts, slots, seed):
    torch.manual_seed(seed)
    made = layer("smoe", experts=experts, top_k=min(slots, experts))
    assert_matches(made, "router", reference.sparse, torch.randn(tokens, 8))


@pytest.mark.parametrize("source", ["code", "blend", "residual"])
@pytest.mark.parametrize("combine", ["sum", "gate"])
@pytest.mark.parametrize(
    ("mode", "naive"), [("both", reference.both), ("router", reference.sparse), ("discrete", reference.discrete)]
)
def test_vqmoe_matches_the_loops_in_every_mode(source, combine, mode, naive):
    torch.manual_seed(1)
    made = layer("vqmoe", input=source, combine=combine, top_k=2 if combine == "gate" else 1)
    assert_matches(made, mode, naive, torch.randn(30, 8))


def test_all_tokens_to_one_expert_and_a_single_token():
    torch.manual_seed(0)
    made = layer("smoe", top_k=1)
    with torch.no_grad():
        made.router.scores.bias.copy_(torch.tensor([0.0, 50.0, 0.0, 0.0]))
    x_ND = torch.randn(9, 8)
    assert made(x_ND, "router").index_NK.unique().tolist() == [1]
    assert_matches(made, "router", reference.sparse, x_ND)
    made.zero_grad()
    assert_matches(made, "router", reference.sparse, x_ND[:1])


def test_code_points_to_expert_by_remainder():
    torch.manual_seed(0)
    made = layer("vqmoe", experts=4, codes=12)
    output = made(torch.randn(200, 8), "discrete")
    assert torch.equal(output.index_NK[:, 0], output.code_N % 4)
    assert len(output.code_N.unique()) > 4


def test_discrete_mode_uses_neither_router_nor_gate():
    torch.manual_seed(0)
    made = layer("vqmoe", combine="gate")
    x_ND = torch.randn(10, 8)
    before = made(x_ND, "discrete").y_ND
    with torch.no_grad():
        for parameter in (*made.router.parameters(), *made.gate.parameters()):
            parameter.add_(10.0)
    assert torch.equal(made(x_ND, "discrete").y_ND, before)
    assert not torch.equal(made(x_ND, "both").y_ND, before)


def test_router_of_one_expert_gets_a_gradient():
    # The released code's router had weight 1 and no gradient: it stayed random.
    torch.manual_seed(0)
    made = layer("smoe", top_k=1)
    made(torch.randn(16, 8), "router").y_ND.square().sum().backward()
    assert made.router.scores.weight.grad.abs().max() > 0


def test_losses_are_values_with_their_weights():
    torch.manual_seed(0)
    made = layer("vqmoe", beta=0.5, commitment=0.2, balance=0.03).train()
    losses = made(torch.randn(16, 8), "both").losses
    assert {name: round(loss.weight, 6) for name, loss in losses.items()} == {"balance": 0.03, "codebook": 0.5, "commitment": 0.1}
    assert all(loss.value > 0 for loss in losses.values())


def test_dropping_the_routed_path_leaves_the_discrete_one():
    torch.manual_seed(0)
    made = layer("vqmoe", drop_routed=0.5).train()
    x_ND = torch.randn(16, 8)
    made.quantizer.start(x_ND)
    made.quantizer.freeze()
    seen = {made(x_ND, "both").index_NK.shape[1] for _ in range(30)}
    assert seen == {1, 2}
    assert {made.eval()(x_ND, "both").index_NK.shape[1] for _ in range(10)} == {2}


@pytest.mark.parametrize(
    ("method", "changes", "words"),
    [
        ("smoe", {"top_k": 5}, "top_k is 5: at most model.experts (4)"),
        ("vqmoe", {"codes": 6}, "codes is 6: must be a multiple of model.experts (4)"),
    ],
)
def test_settings_that_do_not_fit_the_experts(method, changes, words):
    base = VQ if method == "vqmoe" else {"top_k": 2, "balance": 0.01}
    with pytest.raises(ValueError, match=words.replace("(", r"\(").replace(")", r"\)")):
        SETTINGS[method](**(base | changes)).check(4)
    with pytest.raises(ValidationError):
        SETTINGS[method](**(base | {"nonsense": 1}))
