import pytest
import torch

from pipeline.moe.routers.base import Sizes
from pipeline.moe.routers.vmoe import VMoE
from tests.moe import reference
from tests.moe.compare import CASE, EDGES, SECTIONS, assert_matches, over_cases


@pytest.fixture
def silent(monkeypatch):
    """Training, in which experts have a capacity, without noise."""
    monkeypatch.setattr(torch, "randn_like", torch.zeros_like)


def router(scores_NE, **changes):
    """The answer of a router in training to tokens that are their own scores."""
    experts = len(scores_NE[0])
    made = VMoE(SECTIONS["vmoe"].model_copy(update=changes), Sizes(experts, experts, 8, 0, 0.0)).train()
    torch.nn.init.eye_(made.scores.weight)
    return made(torch.tensor(scores_NE), None)


@pytest.mark.parametrize("priority", ["batch", "none"])
@pytest.mark.parametrize("capacity", [0.0, 0.3, 1.0, 1.5])
@over_cases
def test_matches_the_loops(priority, capacity, case):
    made = case.layer("vmoe", capacity=capacity, priority=priority).train()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randn_like", torch.zeros_like)
        assert_matches(made, "router", reference.vmoe, *case.inputs())


@over_cases
def test_after_training_there_is_no_limit(case):
    limited, free = (case.layer("vmoe", capacity=capacity).eval() for capacity in (0.3, 0.0))
    free.load_state_dict(limited.state_dict())
    x_ND, id_N = case.inputs()
    assert torch.equal(limited(x_ND, "router", id_N).y_ND, free(x_ND, "router", id_N).y_ND)


@pytest.mark.parametrize("case", [CASE, CASE._replace(top_k=1), *EDGES.values()])
def test_matches_the_loops_with_noise(monkeypatch, case):
    noise_NE = torch.randn(case.tokens, case.experts, dtype=torch.double)
    monkeypatch.setattr(torch, "randn_like", lambda like: noise_NE.to(like))
    made, inputs = case.layer("vmoe", capacity=0.7).train(), case.inputs()

    def naive(layer, x_ND, id_N):
        monkeypatch.undo()
        return reference.vmoe(layer, x_ND, id_N, noise_NE)

    assert_matches(made, "router", naive, *inputs)


def test_first_choices_come_first_and_then_the_order_or_the_weight(silent):
    # All want expert 0 first, then 1, 0 and 1; there is room for two tokens per expert.
    scores_NE = [[2.0, 1.0, 0.0], [4.0, 0.0, -1.0], [3.0, 1.0, 0.0]]
    assert router(scores_NE, capacity=1.0, priority="none").index_NK.tolist() == [[0, 1], [0, 1], [-1, -1]]
    assert router(scores_NE, capacity=1.0, priority="batch").index_NK.tolist() == [[-1, -1], [0, 1], [0, 1]]
    assert router(scores_NE, capacity=0.0, priority="none").index_NK.tolist() == [[0, 1]] * 3
    # A second choice waits for all first ones, whatever its token's weight.
    mixed_NE = [[9.0, 8.0, 0.0], [0.0, 1.0, 0.5], [0.0, 1.0, 0.9]]
    assert router(mixed_NE, capacity=1.0, priority="batch").index_NK.tolist() == [[0, -1], [1, 2], [1, 2]]


def test_the_lower_token_goes_first_among_equals(silent):
    scores_NE = [[1.0, 0.0]] * 40
    for priority in ("batch", "none"):
        index_N1 = router(scores_NE, top_k=1, capacity=0.5, priority=priority).index_NK
        assert index_N1.flatten().tolist() == [0] * 10 + [-1] * 30


@pytest.mark.parametrize(("tokens", "room"), [(1, 1), (5, 1), (7, 2), (40, 10)])
def test_room_is_rounded_and_at_least_one(silent, tokens, room):
    index_N1 = router([[1.0, 0.0]] * tokens, top_k=1, capacity=0.5, priority="none").index_NK
    assert int((index_N1 == 0).sum()) == room


def test_weights_are_probabilities_among_all_experts(silent):
    route = router([[2.0, 1.0, 0.0]], capacity=0.0)
    torch.testing.assert_close(route.weight_NK, torch.tensor([[2.0, 1.0, 0.0]]).softmax(1)[:, :2])


def test_a_token_that_no_expert_took_gets_nothing(silent):
    made, x_ND = CASE.layer("vmoe", capacity=0.2).train(), CASE.inputs()[0]
    output = made(x_ND, "router")
    left_N = (output.index_NK < 0).all(1)
    assert 0 < left_N.sum() < 12
    assert not output.y_ND[left_N].any() and output.y_ND[~left_N].any(1).all()


def test_noise_has_the_deviation_1_over_e_and_only_while_training():
    made, x_ND = CASE.layer("vmoe"), torch.randn(4000, 4)
    clean_NE = made.router.scores(x_ND).detach()
    assert torch.equal(made(x_ND, "router").scores, clean_NE)
    noise_NE = made.train()(x_ND, "router").scores - clean_NE
    assert noise_NE.std().item() == pytest.approx(1 / 4, rel=0.03)
    assert abs(noise_NE.mean().item()) < 0.01


def test_both_losses_share_the_weight():
    losses = CASE.layer("vmoe", balance=0.06)(CASE.inputs()[0], "router").losses
    assert {name: loss.weight for name, loss in losses.items()} == {"importance": 0.03, "load": 0.03}
