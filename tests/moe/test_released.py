import pytest
import torch

from pipeline.moe.layer import SETTINGS, build_layer
from pipeline.moe.routers.base import Sizes
from tests.moe import reference
from tests.moe.compare import CASE, SECTIONS, WIDTH, assert_matches, over_cases

MODES = {"both": reference.released_both, "router": reference.released_router, "discrete": reference.released_discrete}


@pytest.mark.parametrize("mode", MODES)
@over_cases
def test_matches_the_loops_in_every_mode(mode, case):
    made = case.layer("vqmoe_released", codes=2 * case.experts)
    assert_matches(made, mode, MODES[mode], *case.inputs())
    assert_matches(made.train(), mode, MODES[mode], *case.inputs())


def test_where_it_starts(seeded):
    made = build_layer("vqmoe_released", SECTIONS["vqmoe_released"], Sizes(64, 8, 128, 7, 0.0))
    for tensor in (made.experts.w1_EDH, made.experts.w2_EHD, made.quantizer.codebook_CD, made.gate.weight):
        assert tensor.std().item() == pytest.approx(0.02, rel=0.2)
    torch.testing.assert_close(made.router.expert_ED @ made.router.expert_ED.T, 0.32**2 * torch.eye(8))
    assert not made.experts.b1_EH.any()
    assert not made.gate.bias.any()


def test_the_router_gets_no_gradient_and_the_codebook_none_of_the_task():
    made = CASE.layer("vqmoe_released").train()
    output = made(torch.randn(12, WIDTH, requires_grad=True), "both")
    output.y_ND.square().sum().backward(retain_graph=True)
    assert not made.router.expert_ED.grad.any()
    assert made.quantizer.codebook_CD.grad is None
    assert made.gate.weight.grad.any()
    output.losses["codebook"].value.backward()
    assert made.quantizer.codebook_CD.grad.any()
    assert output.losses.keys() == {"codebook", "commitment"}
    assert {name: round(loss.weight, 6) for name, loss in output.losses.items()} == {"codebook": 0.08, "commitment": 0.02}


def test_dropout_is_on_the_routed_path_alone():
    made = CASE.layer("vqmoe_released").train()
    made.experts.dropout = 0.5
    x_ND = torch.randn(12, WIDTH)
    assert torch.equal(made(x_ND, "discrete").y_ND, made(x_ND, "discrete").y_ND)
    assert not torch.equal(made(x_ND, "router").y_ND, made(x_ND, "router").y_ND)
    assert torch.equal(made.eval()(x_ND, "router").y_ND, made(x_ND, "router").y_ND)


def test_repair_gives_idle_codes_a_token_and_leaves_the_others(seeded):
    made = CASE.layer("vqmoe_released", codes=8)
    with torch.no_grad():
        made.quantizer.codebook_CD[3:] = 100.0
    x_ND = torch.randn(50, WIDTH)
    before = made.quantizer.codebook_CD.clone()
    used_C = torch.bincount(made.quantizer(x_ND).argmax(1), minlength=8) > 0
    made.quantizer.repair(x_ND)
    assert torch.equal(made.quantizer.codebook_CD[used_C], before[used_C])
    assert all((code_D == x_ND).all(1).any() for code_D in made.quantizer.codebook_CD[~used_C])


def test_a_frozen_codebook_does_not_learn_and_the_backbone_still_commits():
    made = CASE.layer("vqmoe_released").train()
    assert made.assignment_parameters() == [made.quantizer.codebook_CD]
    made.freeze_assignment()
    x_ND = torch.randn(12, WIDTH, requires_grad=True)
    sum(loss.value for loss in made(x_ND, "discrete").losses.values()).backward()
    assert made.quantizer.codebook_CD.grad is None
    assert x_ND.grad.any()


def test_codes_must_be_a_multiple_of_the_experts():
    with pytest.raises(ValueError, match=r"codes is 6: must be a multiple of model.experts \(4\)"):
        SETTINGS["vqmoe_released"](**(SECTIONS["vqmoe_released"].model_dump() | {"codes": 6})).check(4)
