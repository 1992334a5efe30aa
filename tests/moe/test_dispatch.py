import copy

import pytest
import torch

from pipeline.moe.dispatch import apply_experts
from pipeline.moe.experts import Experts
from tests.moe.compare import assert_same_gradients, over_cases
from tests.moe.reference import expert


def _assert_matches(experts, index_NK):
    """Results and gradients for inputs by token and by assignment."""
    exact = copy.deepcopy(experts).double()
    for x in (torch.randn(len(index_NK), 8), torch.randn(*index_NK.shape, 8)):
        fast_x, exact_x = x.clone().requires_grad_(), x.double().requires_grad_()
        fast, slow = apply_experts(experts, fast_x, index_NK), _naive(exact, exact_x, index_NK)
        torch.testing.assert_close(fast.double(), slow, atol=1e-5, rtol=1e-4)
        upstream = torch.randn_like(slow)
        (fast * upstream.float()).sum().backward()
        (slow * upstream).sum().backward()
        assert_same_gradients(experts, fast_x, exact, exact_x)


def _naive(experts, x, index_NK):
    inputs = x if x.dim() == 3 else x[:, None].expand(-1, index_NK.shape[1], -1)
    nothing = torch.zeros_like(inputs[0, 0])
    return torch.stack(
        [
            torch.stack([expert(experts, int(e), inputs[n, k]) if e >= 0 else nothing for k, e in enumerate(row)])
            for n, row in enumerate(index_NK)
        ]
    )


@over_cases
def test_one_input_per_token_and_one_per_assignment(case):
    torch.manual_seed(case.seed)
    experts = Experts(case.experts, 8, 12)
    torch.nn.init.normal_(experts.b1_EH)
    score_NE = torch.rand(1 if case.same else case.tokens, case.experts).expand(case.tokens, -1)
    index_NK = score_NE.topk(case.top_k).indices
    _assert_matches(experts, index_NK)


@pytest.mark.parametrize("share", [0.01, 0.4, 0.9])
def test_without_an_expert_there_is_nothing_and_it_costs_nothing(share):
    torch.manual_seed(0)
    experts, rows = Experts(4, 8, 12), []
    torch.nn.init.normal_(experts.b1_EH)
    torch.nn.init.normal_(experts.b2_ED)
    experts.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    index_NK = torch.randint(4, (30, 3)).masked_fill(torch.rand(30, 3) < share, -1)
    _assert_matches(experts, index_NK)
    there = int((index_NK >= 0).sum())
    assert rows == [there, there] and (there < 90)
    assert not apply_experts(experts, torch.randn(30, 8), index_NK)[index_NK < 0].any()


def test_no_token_may_have_an_expert():
    experts, x_ND = Experts(4, 8, 12), torch.randn(5, 8, requires_grad=True)
    y_NKD = apply_experts(experts, x_ND, torch.full((5, 2), -1))
    assert y_NKD.shape == (5, 2, 8) and not y_NKD.any()
    y_NKD.sum().backward()
    assert not x_ND.grad.any() and not any(parameter.grad.any() for parameter in experts.parameters())


def test_gradient_of_an_empty_expert_is_zero_and_bits_repeat():
    torch.manual_seed(0)
    experts = Experts(5, 8, 12)
    x_ND, index_NK = torch.randn(50, 8, requires_grad=True), torch.randint(4, (50, 2))
    grads = []
    for _ in range(2):
        apply_experts(experts, x_ND, index_NK).square().sum().backward()
        grads.append([parameter.grad for parameter in (x_ND, *experts.parameters())])
        experts.zero_grad()
        x_ND.grad = None
    assert not grads[0][1][4].any()
    assert grads[0][1][:4].any()
    assert all(torch.equal(one, other) for one, other in zip(*grads, strict=True))


def test_permuting_tokens_permutes_results():
    torch.manual_seed(0)
    experts = Experts(4, 8, 12)
    x_ND, index_NK, order = torch.randn(20, 8), torch.randint(4, (20, 2)), torch.randperm(20)
    torch.testing.assert_close(
        apply_experts(experts, x_ND[order], index_NK[order]), apply_experts(experts, x_ND, index_NK)[order]
    )
