import pytest
import torch

from pipeline.training.optim import adam
from tests.moe import reference
from tests.moe.compare import CASE, VOCABULARY, WIDTH, assert_matches, over_cases


@over_cases
def test_stage_1_matches_the_loops(case):
    assert_matches(case.layer("stablemoe"), "router", reference.stablemoe, *case.inputs())


@over_cases
def test_stage_2_matches_the_loops(case):
    made = case.layer("stablemoe")
    made.router.begin_step([made.router], 0.1)
    assert_matches(made, "router", reference.stablemoe, *case.inputs())


def test_stage_2_begins_at_its_share_and_never_ends():
    made = CASE.layer("stablemoe", distil_share=0.3)
    for done, frozen in ((0.0, False), (0.29, False), (0.3, True), (0.9, True), (0.0, True)):
        made.router.begin_step([made.router], done)
        assert bool(made.router.frozen) is frozen


def test_the_light_router_learns_from_its_loss_alone_and_nothing_else_does():
    made = CASE.layer("stablemoe")
    x_ND, id_N = CASE.inputs()
    x_ND.requires_grad_()
    output = made(x_ND, "router", id_N)
    output.losses["distil"].value.backward(retain_graph=True)
    assert x_ND.grad is None
    assert made.router.expert_ED.grad is None
    assert all(parameter.grad.abs().max() > 0 for parameter in made.router.light.parameters())
    made.zero_grad()
    output.y_ND.sum().backward()
    assert all(parameter.grad is None for parameter in made.router.light.parameters())


def test_distillation_ends_in_agreement_where_ids_tell_tokens_apart():
    made = CASE.layer("stablemoe", top_k=1).train()
    id_N = torch.arange(VOCABULARY)
    x_ND = torch.randn(VOCABULARY, WIDTH)
    before = made(x_ND, "router", id_N).index_NK
    optimizer = adam(made.router.light, 0.1)
    for _ in range(50):
        optimizer.zero_grad()
        made(x_ND, "router", id_N).losses["distil"].value.backward()
        optimizer.step()
    made.router.begin_step([made.router], 1.0)
    assert torch.equal(made(x_ND, "router", id_N).index_NK, before)


def test_in_stage_2_ids_alone_decide_the_light_router_stays_and_the_rest_learns():
    made = CASE.layer("stablemoe").train()
    made.router.begin_step([made.router], 0.5)
    _, id_N = CASE.inputs()
    light = [parameter.clone() for parameter in made.router.light.parameters()]
    weights = made.router.expert_ED.clone()
    index_NK = made(torch.randn(12, WIDTH), "router", id_N).index_NK
    optimizer = adam(made, 0.1, weight_decay=0.1)
    for _ in range(3):
        output = made(torch.randn(12, WIDTH), "router", id_N)
        assert torch.equal(output.index_NK, index_NK)
        assert output.losses == {}
        optimizer.zero_grad()
        output.y_ND.square().sum().backward()
        optimizer.step()
    assert all(torch.equal(one, other) for one, other in zip(light, made.router.light.parameters(), strict=True))
    assert not torch.equal(weights, made.router.expert_ED)


def test_the_stage_survives_save_and_load_and_decides_what_a_warm_up_may_change():
    made, loaded = CASE.layer("stablemoe"), CASE._replace(seed=1).layer("stablemoe")
    assert set(made.assignment_parameters()) == set(made.router.parameters())
    made.router.begin_step([made.router], 0.5)
    loaded.load_state_dict(made.state_dict())
    assert loaded.router.frozen
    assert loaded.assignment_parameters() == [loaded.router.expert_ED]
    x_ND, id_N = CASE.inputs()
    assert torch.equal(loaded(x_ND, "router", id_N).index_NK, made(x_ND, "router", id_N).index_NK)
    assert torch.equal(loaded(x_ND, "router", id_N).y_ND, made(x_ND, "router", id_N).y_ND)


def test_without_token_ids_it_says_so():
    with pytest.raises(AssertionError, match="stablemoe"):
        CASE.layer("stablemoe")(torch.randn(3, WIDTH), "router")
