import math

import pytest
import torch
from torch.nn.functional import cosine_similarity

from pipeline.moe import stats


def test_uniform_and_collapsed_load():
    uniform = stats.load(stats.shares(torch.tensor([2, 2, 2, 2])))
    assert uniform == {"imbalance": 0.0, "entropy": pytest.approx(1.0), "variation": 0.0, "unused": 0}
    collapsed = stats.load(stats.shares(torch.tensor([8, 0, 0, 0])))
    assert collapsed["imbalance"] == 3.0
    assert collapsed["entropy"] == 0.0
    assert collapsed["unused"] == 3
    assert collapsed["variation"] == pytest.approx(math.sqrt(3))


def test_codebook_use():
    use = stats.codebook_use(stats.shares(torch.tensor([2, 2, 0, 0, 0, 0, 0, 0])))
    assert use["utilisation"] == 0.25
    assert use["perplexity"] == pytest.approx(2.0)


def test_kappa_is_what_chance_leaves_of_consistency():
    generator = torch.Generator().manual_seed(0)
    index = torch.stack([torch.randperm(4, generator=generator)[:2] for _ in range(3000)])
    assert stats.kappa(index, index, 4) == pytest.approx(1)
    assert stats.kappa(index, index[torch.randperm(3000, generator=generator)], 4) == pytest.approx(0, abs=0.05)
    half = torch.cat([index[:1500], index[torch.randperm(3000, generator=generator)[:1500]]])
    assert stats.kappa(index, half, 4) == pytest.approx(0.5, abs=0.05)
    # All experts, or the same one for all tokens: nothing was chosen.
    everyone = torch.tensor([[0, 1], [1, 0]])
    assert stats.kappa(everyone, everyone, 2) is None
    assert stats.kappa(torch.zeros(5, 1, dtype=torch.long), torch.zeros(5, 1, dtype=torch.long), 3) is None


def test_consistency_ignores_the_order_of_slots():
    a = torch.tensor([[0, 1], [2, 3], [4, 5]])
    b = torch.tensor([[1, 0], [2, 7], [6, 7]])
    assert stats.consistency(a, b) == pytest.approx((1 + 0.5 + 0) / 3)


def test_who_has_no_expert_counts_nowhere():
    before, after = torch.tensor([[0, 1], [2, -1], [-1, -1], [0, 3]]), torch.tensor([[1, -1], [2, 3], [0, -1], [3, 0]])
    assert stats.counts(before, 5).tolist() == [2, 1, 1, 1, 0]
    assert stats.consistency(before, after) == 4 / 5
    assert stats.fluctuation(before, after) == pytest.approx(1 / 5)
    # Of 4 tokens 2 meet expert 0 after, 1 meets 1, 1 meets 2 and 2 meet 3; before, 2, 1, 1 and 1 of 5 assignments.
    chance = (2 * 2 + 1 * 1 + 1 * 1 + 1 * 2) / (5 * 4)
    assert stats.kappa(before, after, 5) == pytest.approx((4 / 5 - chance) / (1 - chance))
    assert stats.effective_rank_by_expert(torch.eye(3), before[:3], 3) is None


def test_fluctuation_is_what_consistency_leaves():
    before, after = torch.tensor([[0, 1], [2, 3]]), torch.tensor([[1, 0], [2, 7]])
    assert stats.fluctuation(before, after) == pytest.approx(0.25)
    assert stats.fluctuation(before.to(torch.uint8), before.to(torch.uint8)) == 0.0


def test_margin_against_a_loop_whatever_the_unit(seeded):
    scores_NE = torch.randn(50, 6)
    naive = []
    for row in scores_NE.tolist():
        mean = sum(row) / 6
        best, second, *_ = sorted(row, reverse=True)
        naive.append((best - second) / math.sqrt(sum((value - mean) ** 2 for value in row) / 6))
    assert stats.margin(scores_NE) == pytest.approx(sum(naive) / 50)
    assert stats.margin(3e-4 * scores_NE + torch.randn(50, 1)) == pytest.approx(sum(naive) / 50, rel=1e-2)
    assert stats.margin(scores_NE[:1]) == pytest.approx(naive[0])


def test_margin_at_its_bounds_and_where_there_is_none():
    assert stats.margin(torch.tensor([[1.0, 0, 0, 0, 0]])) == pytest.approx(5 / math.sqrt(4))
    assert stats.margin(torch.full((3, 4), 0.1)) == 0.0
    assert stats.margin(torch.tensor([[0.1, 0.1, -1e30]])) == 0.0
    assert stats.margin(torch.randn(5, 2)) is None
    assert stats.margin(torch.randn(5, 1)) is None


@pytest.mark.parametrize("shape", [(2, 1, 3), (4, 30, 5), (3, 4, 40)])
def test_output_cosine_against_a_loop(shape, seeded):
    y_END = torch.randn(shape) + 0.5
    naive = [cosine_similarity(y_END[e], y_END[f], dim=1) for e in range(shape[0]) for f in range(e)]
    assert stats.output_cosine(y_END) == pytest.approx(torch.cat(naive).mean().item(), abs=1e-6)


def test_output_cosine_of_experts_that_agree_turn_away_or_are_silent(seeded):
    y_ND = torch.randn(7, 4)
    assert stats.output_cosine(torch.stack([y_ND, 3 * y_ND, 0.1 * y_ND])) == pytest.approx(1.0)
    assert stats.output_cosine(torch.stack([y_ND, -y_ND])) == pytest.approx(-1.0)
    assert stats.output_cosine(torch.eye(3)[:, None].repeat(1, 7, 1)) == pytest.approx(0.0)
    assert stats.output_cosine(torch.zeros(3, 7, 4)) == 0.0


def naive_cka(y_ND, z_ND):
    """HSIC of the tokens' centred kernels, as the paper defines it: N x N."""
    centre_NN = torch.eye(len(y_ND)).double() - 1 / len(y_ND)
    k, m = (centre_NN @ given_ND @ given_ND.T @ centre_NN for given_ND in (y_ND.double(), z_ND.double()))
    return ((k * m).sum() / (k.square().sum() * m.square().sum()).sqrt()).item()


@pytest.mark.parametrize("shape", [(2, 2, 3), (4, 30, 5), (3, 4, 40)])
def test_cka_against_the_kernels_of_the_tokens(shape, seeded):
    y_END = torch.randn(shape) + 0.5
    naive = [naive_cka(y_END[e], y_END[f]) for e in range(shape[0]) for f in range(e)]
    assert stats.cka(y_END) == pytest.approx(sum(naive) / len(naive))


def test_cka_does_not_see_rotation_scale_and_shift(seeded):
    y_ND, turn_DD = torch.randn(20, 6), torch.linalg.qr(torch.randn(6, 6)).Q
    assert stats.cka(torch.stack([y_ND, 0.01 * y_ND @ turn_DD + 3])) == pytest.approx(1.0)
    assert stats.cka(torch.stack([y_ND, y_ND, y_ND])) == pytest.approx(1.0)
    assert stats.cka(torch.stack([y_ND, y_ND @ torch.randn(6, 6)])) < 0.95


def test_cka_of_outputs_that_vary_in_different_ways_or_not_at_all(seeded):
    axes_NN = torch.linalg.qr(torch.cat([torch.ones(9, 1), torch.randn(9, 8)], 1)).Q
    assert stats.cka(torch.stack([axes_NN[:, 1:4], axes_NN[:, 4:7]])) == pytest.approx(0.0, abs=1e-9)
    constant_ND = torch.rand(1, 3, dtype=torch.double).repeat(1001, 1)  # whose mean is off by a rounding error
    assert stats.cka(torch.stack([constant_ND, constant_ND, torch.randn(1001, 3).double()])) == 0.0
    assert stats.cka(torch.randn(3, 1, 4)) == 0.0


@pytest.mark.parametrize("shape", [(2, 5), (30, 4), (4, 30)])
def test_effective_rank_against_the_variances_of_the_directions(shape, seeded):
    x_ND = torch.randn(shape) * torch.arange(1.0, shape[1] + 1) + 5
    centred = [[(value - x_ND[:, d].double().mean()).item() for d, value in enumerate(row.double())] for row in x_ND]
    gram = [[sum(a * b for a, b in zip(one, other, strict=True)) for other in centred] for one in centred]
    values = [
        math.sqrt(value) for value in torch.linalg.eigvalsh(torch.tensor(gram, dtype=torch.double)).tolist() if value > 1e-9
    ]
    chances = [value / sum(values) for value in values]
    assert stats.effective_rank(x_ND) == pytest.approx(math.exp(-sum(p * math.log(p) for p in chances)))


def test_effective_rank_of_known_states(seeded):
    corners_ND = torch.cat([torch.eye(4), -torch.eye(4)])
    assert stats.effective_rank(7 * corners_ND @ torch.linalg.qr(torch.randn(9, 4)).Q.T + 3) == pytest.approx(4.0, rel=1e-5)
    assert stats.effective_rank(torch.arange(5.0)[:, None] * torch.tensor([1.0, 2, 3])) == pytest.approx(1.0)
    assert stats.effective_rank(torch.full((6, 3), 0.1)) == pytest.approx(1.0)
    assert stats.effective_rank(torch.randn(1, 4)) == 1.0


def test_effective_rank_by_expert_weighs_by_tokens_and_counts_each_once(seeded):
    x_ND = torch.randn(9, 6)
    index_NK = torch.tensor([[0, 1], [0, 1], [0, 1], [0, 0], [1, 1], [0, 3], [0, 1], [0, 1], [0, 1]])
    zero, one = x_ND[[0, 1, 2, 3, 5, 6, 7, 8]], x_ND[[0, 1, 2, 4, 6, 7, 8]]
    wanted = (8 * stats.effective_rank(zero) + 7 * stats.effective_rank(one)) / 15
    assert stats.effective_rank_by_expert(x_ND, index_NK, 5) == pytest.approx(wanted)
    assert stats.effective_rank_by_expert(x_ND, torch.zeros(9, 1).long(), 1) == pytest.approx(stats.effective_rank(x_ND))
    assert stats.effective_rank_by_expert(x_ND[:1], index_NK[:1], 5) is None
