import math

import pytest
import torch

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


def test_consistency_ignores_the_order_of_slots():
    a = torch.tensor([[0, 1], [2, 3], [4, 5]])
    b = torch.tensor([[1, 0], [2, 7], [6, 7]])
    assert stats.consistency(a, b) == pytest.approx((1 + 0.5 + 0) / 3)
