import pytest
import torch

from pipeline.moe.routers.base import Sizes
from pipeline.moe.softmoe import SoftMoE
from tests.moe import reference
from tests.moe.compare import CASE, SECTIONS, WIDTH, assert_matches, over_cases


@pytest.mark.parametrize("slots", [1, 3])
@over_cases
def test_matches_the_loops(slots, case):
    made = case.layer("softmoe", slots=slots)
    x_ND = torch.cat([case.inputs()[0], case.inputs()[0]])
    assert_matches(made, "router", lambda layer, x, id_N: reference.softmoe(layer, x, case.tokens), x_ND, length=case.tokens)


def test_a_sequence_knows_nothing_of_others():
    made = CASE.layer("softmoe")
    x_ND = torch.randn(12, WIDTH)
    together = made(x_ND, "router", None, 4)
    for start in (0, 4, 8):
        alone = made(x_ND[start : start + 4], "router", None, 4)
        torch.testing.assert_close(together.y_ND[start : start + 4], alone.y_ND)
        assert torch.equal(together.index_NK[start : start + 4], alone.index_NK)


def test_scores_are_the_experts_shares_of_the_mix():
    made, x_ND = CASE.layer("softmoe", slots=3), CASE.inputs()[0]
    output = made(x_ND, "router", None, 12)
    assert output.scores.shape == (12, 4) and not output.scores.requires_grad
    torch.testing.assert_close(output.scores.sum(1), torch.ones(12))
    assert torch.equal(output.scores.argmax(1), output.index_NK[:, 0])


def test_fresh_slots_have_length_one_and_the_scale_is_1():
    torch.manual_seed(0)
    made = SoftMoE(SECTIONS["softmoe"], Sizes(256, 8, 8, 0, 0.0))
    assert made.slot_MD.shape == (16, 256)
    assert made.slot_MD.norm(dim=1).mean().item() == pytest.approx(1, abs=0.05)
    assert made.scale.item() == 1
    assert {id(p) for p in made.assignment_parameters()} == {id(made.slot_MD), id(made.scale)}
