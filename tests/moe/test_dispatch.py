import copy

import pytest
import torch

from pipeline.models.flops import count_flops
from pipeline.moe.dispatch import Shift, apply_experts, each_expert, grouped
from pipeline.moe.experts import Experts
from tests.moe.compare import assert_same_gradients, over_cases
from tests.moe.reference import expert

# The second is a GPU's, but runs here.
both_ways = pytest.mark.parametrize("way", [each_expert, grouped])


def _experts(count, **given):
    torch.manual_seed(0)
    experts = Experts(count, 8, 16, **given)
    torch.nn.init.normal_(experts.b1_EH)
    torch.nn.init.normal_(experts.b2_ED)
    return experts


def _assert_matches(way, experts, index_NK):
    """Results and gradients for inputs by token and by assignment, with weights and without."""
    exact = copy.deepcopy(experts).double()
    for x in (torch.randn(len(index_NK), 8), torch.randn(*index_NK.shape, 8)):
        for weight_NK in (None, torch.randn(index_NK.shape)):
            fast_x, exact_x = x.clone().requires_grad_(), x.double().requires_grad_()
            fast_w = None if weight_NK is None else weight_NK.clone().requires_grad_()
            exact_w = None if weight_NK is None else weight_NK.double().requires_grad_()
            fast, slow = way(experts, fast_x, index_NK, fast_w, 0.0), _naive(exact, exact_x, index_NK)
            slow = slow if weight_NK is None else (exact_w[..., None] * slow).sum(1)
            torch.testing.assert_close(fast.double(), slow, atol=1e-5, rtol=1e-4)
            upstream = torch.randn_like(slow)
            (fast * upstream.float()).sum().backward()
            (slow * upstream).sum().backward()
            assert_same_gradients(experts, fast_x, exact, exact_x)
            if weight_NK is not None:
                torch.testing.assert_close(fast_w.grad.double(), exact_w.grad, atol=1e-4, rtol=1e-4)
            experts.zero_grad(), exact.zero_grad()


def _naive(experts, x, index_NK):
    inputs = x if x.dim() == 3 else x[:, None].expand(-1, index_NK.shape[1], -1)
    nothing = torch.zeros_like(inputs[0, 0])
    relu = experts.activation == "relu"
    return torch.stack(
        [
            torch.stack([expert(experts, int(e), inputs[n, k], relu) if e >= 0 else nothing for k, e in enumerate(row)])
            for n, row in enumerate(index_NK)
        ]
    )


@both_ways
@over_cases
def test_one_input_per_token_and_one_per_assignment(way, case):
    experts = _experts(case.experts)
    torch.manual_seed(case.seed)
    score_NE = torch.rand(1 if case.same else case.tokens, case.experts).expand(case.tokens, -1)
    _assert_matches(way, experts, score_NE.topk(case.top_k).indices)


@both_ways
@pytest.mark.parametrize("share", [0.01, 0.4, 0.9])
def test_without_an_expert_there_is_nothing(way, share):
    experts = _experts(4)
    index_NK = torch.randint(4, (30, 3)).masked_fill(torch.rand(30, 3) < share, -1)
    _assert_matches(way, experts, index_NK)
    assert not way(experts, torch.randn(30, 8), index_NK, None, 0.0)[index_NK < 0].any()


def test_without_an_expert_nothing_is_computed():
    experts, index_NK = _experts(4), torch.randint(4, (30, 3))
    index_NK[::3] = -1
    rows = int((index_NK >= 0).sum())
    assert 0 < rows < 90
    x_ND = torch.randn(30, 8, requires_grad=True)
    forward = 2 * rows * 2 * 8 * 16
    assert count_flops(lambda: apply_experts(experts, x_ND, index_NK)) == forward
    assert count_flops(lambda: apply_experts(experts, x_ND, index_NK).sum().backward()) == 3 * forward


@both_ways
def test_no_token_may_have_an_expert(way):
    experts, x_ND = Experts(4, 8, 16), torch.randn(5, 8, requires_grad=True)
    weight_NK = torch.ones(5, 2, requires_grad=True)
    for given, shape in ((None, (5, 2, 8)), (weight_NK, (5, 8))):
        y = way(experts, x_ND, torch.full((5, 2), -1), given, 0.0)
        assert y.shape == shape and not y.any()
        y.sum().backward()
    assert not x_ND.grad.any() and not weight_NK.grad.any() and not any(one.grad.any() for one in experts.parameters())


@both_ways
def test_the_other_activation(way):
    experts = _experts(3, activation="relu")
    _assert_matches(way, experts, torch.randint(3, (20, 2)))


@pytest.mark.parametrize("wanted", ["x", "experts", "weight"])
def test_only_the_gradients_that_are_wanted_are_computed(wanted):
    """An attack wants those of x, a warm-up those of the experts; each is as in the company of the others."""
    experts, index_NK = _experts(4), torch.randint(4, (30, 2))
    x_ND, weight_NK = torch.randn(30, 8), torch.rand(30, 2)
    gradients = []
    for some in (("x", "experts", "weight"), (wanted,)):
        inputs = {
            "x": [x_ND.clone().requires_grad_("x" in some)],
            "weight": [weight_NK.clone().requires_grad_("weight" in some)],
            "experts": list(experts.requires_grad_("experts" in some).parameters()),
        }
        y_ND = apply_experts(experts, *inputs["x"], index_NK, *inputs["weight"])
        gradients.append(torch.autograd.grad(y_ND.square().sum(), inputs[wanted]))
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))
    if wanted == "x":  # forward, and of the backward's four products the two that lead there
        cost = 2 * 60 * 2 * 8 * 16
        assert (
            count_flops(lambda: torch.autograd.grad(apply_experts(experts, *inputs["x"], index_NK).sum(), inputs["x"]))
            == 2 * cost
        )


@pytest.mark.parametrize("way", [each_expert, grouped])
def test_dropout_leaves_out_hidden_units_in_both_directions(way):
    """With W1 = 0 and b1 = 1 all units are alike, and an answer tells how many were kept."""
    experts = Experts(2, 8, 1000)
    with torch.no_grad():
        experts.w1_EDH.zero_(), experts.b1_EH.fill_(1.0), experts.w2_EHD.fill_(1.0)
    x_ND, index_N1 = torch.randn(40, 8), torch.randint(2, (40, 1))
    y_N1D = way(experts, x_ND, index_N1, None, 0.25)
    kept_N = y_N1D[:, 0, 0] / torch.nn.functional.gelu(torch.tensor(1.0)) * 0.75
    torch.testing.assert_close(kept_N, kept_N.round(), atol=1e-2, rtol=0)
    assert 720 < kept_N.mean() < 780 and kept_N.std() > 5
    y_N1D[:, 0, 0].sum().backward()
    by_unit_EH = experts.w2_EHD.grad[..., 0] / torch.nn.functional.gelu(torch.tensor(1.0)) * 0.75
    torch.testing.assert_close(by_unit_EH.sum(), kept_N.sum(), atol=1.0, rtol=0)
    # dy/db1 is W2 mask gelu'(1) / 0.75.
    slope = torch.autograd.grad(torch.nn.functional.gelu(one := torch.ones((), requires_grad=True)), one)[0]
    torch.testing.assert_close(experts.b1_EH.grad / slope * 0.75, by_unit_EH, atol=1e-2, rtol=0)


def test_experts_drop_out_in_training_unless_told_not_to():
    experts, x_ND, index_N1 = _experts(2, dropout=0.5), torch.randn(10, 8), torch.zeros(10, 1, dtype=torch.long)

    def same(**given):
        return torch.equal(*(apply_experts(experts, x_ND, index_N1, **given) for _ in range(2)))

    assert not same() and same(drop=False)
    experts.eval()
    assert same()


@both_ways
def test_gradient_of_an_empty_expert_is_zero_and_bits_repeat(way):
    torch.manual_seed(0)
    experts = Experts(5, 8, 16)
    x_ND, index_NK = torch.randn(50, 8, requires_grad=True), torch.randint(4, (50, 2))
    grads = []
    for _ in range(2):
        way(experts, x_ND, index_NK, None, 0.0).square().sum().backward()
        grads.append([parameter.grad for parameter in (x_ND, *experts.parameters())])
        experts.zero_grad()
        x_ND.grad = None
    assert not grads[0][1][4].any()
    assert grads[0][1][:4].any()
    assert all(torch.equal(one, other) for one, other in zip(*grads, strict=True))


@both_ways
def test_permuting_tokens_permutes_results(way):
    torch.manual_seed(0)
    experts = Experts(4, 8, 16)
    x_ND, index_NK, order = torch.randn(20, 8), torch.randint(4, (20, 2)), torch.randperm(20)
    torch.testing.assert_close(
        way(experts, x_ND[order], index_NK[order], None, 0.0), way(experts, x_ND, index_NK, None, 0.0)[order]
    )


@both_ways
@over_cases
def test_a_shift_is_for_the_last_expert_of_a_token(way, case):
    """As inputs of their own, gradients of the table too."""
    experts = _experts(case.experts)
    torch.manual_seed(case.seed)
    score_NE = torch.rand(1 if case.same else case.tokens, case.experts).expand(case.tokens, -1)
    index_NK, code_N = score_NE.topk(case.top_k).indices, torch.randint(3, (case.tokens,))
    index_NK = index_NK.masked_fill(torch.rand(index_NK.shape) < 0.1, -1)
    x_ND, table_CD, weight_NK = torch.randn(case.tokens, 8), torch.randn(3, 8), torch.rand(index_NK.shape)
    results = []
    for fused in (True, False):
        given = [one.clone().requires_grad_() for one in (x_ND, table_CD, weight_NK)]
        if fused:
            y_ND = way(experts, given[0], index_NK, given[2], 0.0, Shift(given[1], code_N))
        else:
            x_NKD = given[0][:, None].repeat(1, case.top_k, 1)
            x_NKD = torch.cat([x_NKD[:, :-1], x_NKD[:, -1:] + given[1][code_N][:, None]], 1)
            y_ND = way(experts, x_NKD, index_NK, given[2], 0.0)
        results.append([y_ND.detach(), *torch.autograd.grad(y_ND.square().sum(), [*given, *experts.parameters()])])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-3)


def test_all_experts_answer_rows_of_their_own():
    experts, x_ERD = _experts(3), torch.randn(3, 6, 8)
    index_NK = torch.arange(3).repeat_interleave(6)[:, None]
    torch.testing.assert_close(experts(x_ERD).flatten(0, 1), apply_experts(experts, x_ERD.flatten(0, 1), index_NK)[:, 0])


def test_a_second_backward_pass_says_what_is_missing(seeded):
    experts = Experts(3, 4, 8)
    y_ND = apply_experts(experts, torch.randn(5, 4), torch.randint(3, (5, 2)), torch.rand(5, 2))
    y_ND.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="a second time"):
        y_ND.sum().backward()
