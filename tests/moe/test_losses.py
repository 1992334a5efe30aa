import pytest
import torch

from pipeline.moe.losses import (
    balance_loss,
    codebook_loss,
    commitment_loss,
    distillation_loss,
    importance_loss,
    load_loss,
    overload_loss,
)
from tests.moe import reference


def test_balance_is_exactly_one_when_uniform():
    probs_NE = torch.full((8, 4), 0.25)
    index_NK = torch.arange(8)[:, None] % 4
    assert balance_loss(probs_NE=probs_NE, index_NK=index_NK).item() == 1.0


def test_balance_grows_with_imbalance_up_to_the_number_of_experts():
    values = []
    for sharpness in (0.0, 1.0, 3.0, 30.0):
        probs_NE = (sharpness * torch.eye(4)[torch.zeros(8, dtype=torch.long)]).softmax(-1)
        index_NK = torch.zeros(8, 1, dtype=torch.long) if sharpness else torch.arange(8)[:, None] % 4
        values.append(balance_loss(probs_NE=probs_NE, index_NK=index_NK).item())
    assert values == sorted(values)
    assert values[0] == 1.0
    assert values[-1] == pytest.approx(4.0, abs=1e-4)


def test_balance_against_loops_and_its_gradient_lowers_the_crowded_expert():
    torch.manual_seed(0)
    scores_NE = torch.randn(30, 5, dtype=torch.float64, requires_grad=True)
    index_NK = scores_NE.topk(2).indices
    probs_NE = scores_NE.softmax(-1)
    naive = reference.balance([list(row) for row in probs_NE], index_NK.tolist())
    loss = balance_loss(probs_NE=probs_NE, index_NK=index_NK)
    assert loss.item() == pytest.approx(naive.item(), abs=1e-12)
    loss.backward()
    crowded = torch.bincount(index_NK.flatten()).argmax()
    assert scores_NE.grad[:, crowded].sum() > 0


def test_importance_and_load_are_zero_when_even_and_fall_along_their_gradient():
    # Three groups of tokens, each sure of another expert.
    even_NE = 20 * torch.eye(3)[torch.arange(30) % 3]
    assert importance_loss(probs_NE=even_NE.softmax(-1)).item() == pytest.approx(0, abs=1e-12)
    assert load_loss(scores_NE=even_NE, noisy_NE=even_NE, k=1, deviation=1 / 3).item() == pytest.approx(0, abs=1e-12)
    # One expert has everything: E shares of 0 but one, of variance E - 1 in units of the mean.
    crowded_NE = 100 * torch.eye(3)[torch.zeros(30, dtype=torch.long)]
    assert importance_loss(probs_NE=crowded_NE.softmax(-1)).item() == pytest.approx(2)
    assert load_loss(scores_NE=crowded_NE, noisy_NE=crowded_NE, k=1, deviation=1 / 3).item() == pytest.approx(2)
    torch.manual_seed(0)
    scores_NE = (torch.randn(30, 3) + torch.tensor([1.0, 0.0, 0.0])).requires_grad_()
    importance_loss(probs_NE=scores_NE.softmax(-1)).backward()
    assert scores_NE.grad[:, 0].sum() > 0 > scores_NE.grad[:, 1].sum()
    scores_NE.grad = None
    noisy_NE = scores_NE.detach() + torch.randn(30, 3) / 3
    load_loss(scores_NE=scores_NE, noisy_NE=noisy_NE, k=1, deviation=1 / 3).backward()
    assert scores_NE.grad[:, 0].sum() > 0 > scores_NE.grad[:, 1].sum()


def test_load_is_the_chance_to_be_chosen_under_new_noise(seeded):
    scores_NE, k, deviation = torch.randn(6, 4), 2, 0.25
    noisy_NE = scores_NE + deviation * torch.randn(6, 4)
    threshold_N1 = noisy_NE.topk(k).values[:, -1:]
    drawn_RNE = scores_NE + deviation * torch.randn(20_000, 6, 4)
    total_E = (drawn_RNE > threshold_N1).double().mean(0).sum(0)
    wanted = total_E.var(correction=0) / total_E.mean() ** 2
    found = load_loss(scores_NE=scores_NE, noisy_NE=noisy_NE, k=k, deviation=deviation)
    assert found.item() == pytest.approx(wanted.item(), rel=0.05)


def test_overload_against_loops_and_its_gradient_lowers_the_crowded_expert():
    torch.manual_seed(0)
    scores_NE = torch.randn(30, 5, dtype=torch.float64, requires_grad=True)
    index_NK = scores_NE.topk(2).indices
    weight_NK = scores_NE.gather(1, index_NK).sigmoid()
    loss = overload_loss(weight_NK=weight_NK, index_NK=index_NK, experts=5)
    naive = reference.overload([list(row) for row in weight_NK], index_NK.tolist(), 5)
    assert loss.item() == pytest.approx(naive.item(), abs=1e-12)
    loss.backward()
    count_E = torch.bincount(index_NK.flatten(), minlength=5)
    assert scores_NE.grad[:, count_E.argmax()].sum() > 0 > scores_NE.grad[:, count_E.argmin()].sum()


def test_overload_is_zero_when_every_expert_gets_the_same_number_and_positive_when_one_gets_all():
    weight_NK = torch.rand(8, 1)
    even_NK, crowded_NK = torch.arange(8)[:, None] % 4, torch.zeros(8, 1, dtype=torch.long)
    assert overload_loss(weight_NK=weight_NK, index_NK=even_NK, experts=4).item() == 0.0
    assert overload_loss(weight_NK=weight_NK, index_NK=crowded_NK, experts=4).item() == pytest.approx(3 * weight_NK.mean().item())


def test_distillation_against_loops_and_at_its_least():
    torch.manual_seed(0)
    scores_NE = torch.randn(20, 5, dtype=torch.float64)
    index_NK = torch.randn(20, 5).topk(2).indices
    naive = reference.distillation([list(row) for row in scores_NE], index_NK.tolist())
    assert distillation_loss(scores_NE=scores_NE, index_NK=index_NK).item() == pytest.approx(naive.item(), abs=1e-12)
    sure_NE = torch.zeros(20, 5).scatter(1, index_NK[:, :1], 100.0)
    assert distillation_loss(scores_NE=sure_NE, index_NK=index_NK[:, :1]).item() == pytest.approx(0.0, abs=1e-6)


def test_codebook_and_commitment_pull_different_sides():
    x_ND, value_ND = torch.zeros(3, 2, requires_grad=True), torch.ones(3, 2, requires_grad=True)
    codebook_loss(x_ND=x_ND, value_ND=value_ND).backward()
    assert x_ND.grad is None
    assert torch.allclose(value_ND.grad, torch.full((3, 2), 2 / 6))
    value_ND.grad = None
    loss = commitment_loss(x_ND=x_ND, value_ND=value_ND)
    loss.backward()
    assert value_ND.grad is None
    assert torch.allclose(x_ND.grad, torch.full((3, 2), -2 / 6))
    assert loss.item() == 1.0
