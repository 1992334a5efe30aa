import torch

from pipeline.models.flops import count_flops
from tests.moe import reference
from tests.moe.compare import CASE, WIDTH, assert_matches, over_cases


@over_cases
def test_between_competitions_matches_the_loops(case):
    made = case.layer("competesmoe")
    assert_matches(made, "router", reference.competesmoe, *case.inputs())
    assert_matches(made.train(), "router", reference.competesmoe, *case.inputs())


@over_cases
def test_a_competition_matches_the_loops(case):
    made = case.layer("competesmoe").train()
    made.router.competing = True
    assert_matches(made, "router", reference.competition, *case.inputs())


def test_a_competition_is_for_one_training_step():
    made = CASE.layer("competesmoe")
    made.router.competing = True
    x_ND = torch.randn(12, WIDTH)
    plain = made(x_ND, "router")
    assert "distil" not in plain.losses
    assert "distil" in made.train()(x_ND, "router").losses
    assert "distil" not in made(x_ND, "router").losses
    assert torch.equal(made(x_ND, "router").y_ND, plain.y_ND)


def test_experts_answer_once():
    made = CASE.layer("competesmoe").train()
    made.router.competing = True
    scores, answers = 2 * 12 * WIDTH * 4, 2 * 12 * 4 * 2 * WIDTH * 8
    combination = 2 * 12 * CASE.top_k * WIDTH
    assert count_flops(lambda: made(torch.randn(12, WIDTH), "router")) == scores + answers + combination


def test_the_router_learns_who_wins():
    made = CASE.layer("competesmoe", balance=0.0).train()
    x_ND = torch.randn(12, WIDTH)
    optimizer = torch.optim.Adam([made.router.scores.weight], lr=0.3)
    values = []
    for _ in range(60):
        made.router.competing = True
        output = made(x_ND, "router")
        values.append(output.losses["distil"].value.item())
        optimizer.zero_grad()
        output.losses["distil"].value.backward()
        optimizer.step()
    assert all(parameter.grad is None for parameter in made.experts.parameters())
    assert values[-1] < 0.3 * values[0]


def test_layers_are_drawn_by_probability_and_never_more_than_allowed(seeded):
    routers = [CASE.layer("competesmoe", compete=0.5, at_once=3).router for _ in range(8)]
    torch.manual_seed(0)
    total, seen = [0] * 8, set()
    for step in range(400):
        routers[0].begin_step(routers, step / 400)
        drawn = [router.competing for router in routers]
        seen.add(sum(drawn))
        total = [count + one for count, one in zip(total, drawn, strict=True)]
    assert max(seen) == 3
    assert min(seen) < 3
    # No layer is favoured: 400 steps of nearly 3 layers in 8.
    assert all(100 < count < 185 for count in total)
    for probability, expected in ((0.0, 0), (1.0, 3)):
        some = [CASE.layer("competesmoe", compete=probability, at_once=3).router for _ in range(5)]
        some[0].begin_step(some, 0.0)
        assert sum(router.competing for router in some) == expected
