import pytest
import torch

from pipeline.moe.routers.base import Sizes
from pipeline.moe.routers.xmoe import XMoE
from tests.moe import reference
from tests.moe.compare import CASE, SECTIONS, WIDTH, assert_matches, over_cases


@over_cases
def test_matches_the_loops(case):
    assert_matches(case.layer("xmoe"), "router", reference.xmoe, *case.inputs())


def test_where_it_starts(seeded):
    router = XMoE(SECTIONS["xmoe"], Sizes(width=16, experts=4, hidden=8, vocabulary=7, dropout=0.0))
    assert router.log_temperature.exp().item() == pytest.approx(0.07)
    torch.testing.assert_close(router.expert_EP @ router.expert_EP.T, 0.01 * torch.eye(4))
    # More experts than dimensions: no orthogonal rows, but a start all the same.
    many = XMoE(SECTIONS["xmoe"], Sizes(width=16, experts=20, hidden=8, vocabulary=7, dropout=0.0))
    assert many(torch.randn(5, 16), None).scores_NE.isfinite().all()


def test_scores_are_cosines_over_the_temperature():
    made = CASE.layer("xmoe")
    x_ND = torch.randn(12, WIDTH)
    scores_NE = made.router(x_ND, None).scores_NE
    assert (scores_NE.abs() * made.router.log_temperature.exp() <= 1 + 1e-6).all()
    torch.testing.assert_close(made.router(7 * x_ND, None).scores_NE, scores_NE)
