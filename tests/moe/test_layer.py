import pytest
import torch
from pydantic import ValidationError

from pipeline.moe.layer import SETTINGS, build_layer
from pipeline.moe.routers import ROUTERS
from pipeline.moe.routers.base import Sizes
from tests.moe import reference
from tests.moe.compare import CASE, SECTIONS, assert_matches, over_cases

VQ = {
    "top_k": 1,
    "balance": 0.01,
    "quantizer": "nearest",
    "codes": 8,
    "code_width": 3,
    "input": "residual",
    "blend": 0.05,
    "combine": "sum",
    "drop_routed": 0.0,
    "beta": 0.08,
    "commitment": 0.25,
    "dead_share": 0.1,
}


def layer(method: str, experts: int = 4, width: int = 8, hidden: int = 12, **changes):
    base = VQ if method == "vqmoe" else {"top_k": 2, "balance": 0.01}
    made = build_layer(method, SETTINGS[method](**(base | changes)), Sizes(width, experts, hidden, vocabulary=7, dropout=0.0))
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return made.eval()


@over_cases
def test_a_learned_router_matches_the_loops(case):
    assert_matches(case.layer("smoe"), "router", reference.smoe, *case.inputs())


@over_cases
def test_a_dense_layer_matches_the_loops(case):
    assert_matches(case.layer("dense"), "dense", reference.dense, *case.inputs())


@pytest.mark.parametrize("source", ["code", "blend", "residual"])
@pytest.mark.parametrize("combine", ["sum", "gate"])
@pytest.mark.parametrize(
    ("mode", "naive"), [("both", reference.both), ("router", reference.smoe), ("discrete", reference.discrete)]
)
@over_cases
def test_vqmoe_matches_the_loops_in_every_mode(source, combine, mode, naive, case):
    made = case.layer("vqmoe", quantizer="nearest", codes=2 * case.experts, input=source, combine=combine)
    assert_matches(made, mode, naive, case.inputs()[0])


@over_cases
def test_vqmoe_by_distances_matches_the_loops(case):
    experts = max(2, case.experts)
    case = case._replace(experts=experts, top_k=min(case.top_k, experts - 1))
    changes = {"combine": "distances", "quantizer": "task", "input": "residual"}
    for codes in (experts, 3 * experts):
        assert_matches(case.layer("vqmoe", codes=codes, **changes), "both", reference.by_distance, case.inputs()[0])


def test_by_distances_the_nearest_code_decides_first_and_the_task_reaches_the_codebook():
    torch.manual_seed(0)
    made = layer("vqmoe", combine="distances", quantizer="task")
    x_ND = torch.randn(50, 8)
    output = made(x_ND, "both")
    assert torch.equal(output.index_NK[:, -1:], made(x_ND, "discrete").index_NK)
    assert (output.index_NK[:, 0] != output.index_NK[:, 1]).all()
    output.y_ND.square().sum().backward()
    assert made.quantizer.codebook_CD.grad.abs().max() > 0
    assert not hasattr(made, "router")


def test_all_tokens_to_one_expert_and_a_single_token():
    torch.manual_seed(0)
    made = layer("smoe", top_k=1)
    with torch.no_grad():
        made.router.scores.bias.copy_(torch.tensor([0.0, 50.0, 0.0, 0.0]))
    x_ND = torch.randn(9, 8)
    assert made(x_ND, "router").index_NK.unique().tolist() == [1]
    assert_matches(made, "router", reference.smoe, x_ND)
    assert_matches(made, "router", reference.smoe, x_ND[:1])


def test_code_points_to_expert_by_remainder():
    torch.manual_seed(0)
    made = layer("vqmoe", experts=4, codes=12)
    output = made(torch.randn(200, 8), "discrete")
    assert torch.equal(output.index_NK[:, 0], output.code_N % 4)
    assert len(output.code_N.unique()) > 4


def test_discrete_mode_uses_neither_router_nor_gate():
    torch.manual_seed(0)
    made = layer("vqmoe", combine="gate")
    x_ND = torch.randn(10, 8)
    before = made(x_ND, "discrete").y_ND
    with torch.no_grad():
        for parameter in (*made.router.parameters(), *made.gate.parameters()):
            parameter.add_(10.0)
    assert torch.equal(made(x_ND, "discrete").y_ND, before)
    assert not torch.equal(made(x_ND, "both").y_ND, before)


def test_router_of_one_expert_gets_a_gradient():
    # The released code's router had weight 1 and no gradient: it stayed random.
    torch.manual_seed(0)
    made = layer("smoe", top_k=1)
    made(torch.randn(16, 8), "router").y_ND.square().sum().backward()
    assert made.router.scores.weight.grad.abs().max() > 0


@pytest.mark.parametrize("method", ROUTERS)
def test_a_routers_scores_are_those_that_chose(method):
    made, (x_ND, id_N) = CASE.layer(method), CASE.inputs()
    stages = {"stablemoe": [("frozen", False), ("frozen", True)], "competesmoe": [("competing", False), ("competing", True)]}
    for name, value in stages.get(method, [("training", False)]):
        setattr(made.train().router, name, torch.tensor(value))
        for mode in made.modes:
            output = made(x_ND, mode, id_N)
            assert output.scores.shape == (12, 4) and not output.scores.requires_grad
            best_NK = output.scores.topk(output.index_NK.shape[1]).indices
            assert torch.equal(output.index_NK, best_NK.where(output.index_NK >= 0, -1))


@pytest.mark.parametrize("method", ["vqmoe", "vqmoe_released"])
def test_the_codes_scores_are_those_that_chose_unless_only_the_router_does(method):
    changes = {"codes": 8} | ({"combine": "gate"} if method == "vqmoe" else {})
    made, x_ND = CASE.layer(method, **changes), CASE.inputs()[0]
    for mode in ("both", "discrete"):
        output = made(x_ND, mode)
        assert output.scores.shape == (12, 8) and not output.scores.requires_grad
        assert torch.equal(output.scores.argmax(1), output.code_N)
    routed = made(x_ND, "router")
    assert routed.scores.shape == (12, 4) and not routed.scores.requires_grad
    assert torch.equal(routed.scores.argmax(1), routed.index_NK[:, 0])


def test_nothing_is_scored_in_a_dense_layer_or_by_the_digits_of_a_grid():
    x_ND = CASE.inputs()[0]
    assert CASE.layer("dense")(x_ND, "dense").scores is None
    assert CASE.layer("vqmoe", quantizer="fsq", codes=8, combine="gate")(x_ND, "discrete").scores is None


def test_losses_are_values_with_their_weights():
    torch.manual_seed(0)
    made = layer("vqmoe", beta=0.5, commitment=0.2, balance=0.03).train()
    losses = made(torch.randn(16, 8), "both").losses
    assert {name: round(loss.weight, 6) for name, loss in losses.items()} == {"balance": 0.03, "codebook": 0.5, "commitment": 0.1}
    assert all(loss.value > 0 for loss in losses.values())


def test_dropping_the_routed_path_leaves_the_discrete_one():
    torch.manual_seed(0)
    made = layer("vqmoe", drop_routed=0.5).train()
    x_ND = torch.randn(16, 8)
    made.quantizer.start(x_ND)
    made.quantizer.freeze()
    seen = {made(x_ND, "both").index_NK.shape[1] for _ in range(30)}
    assert seen == {1, 2}
    assert {made.eval()(x_ND, "both").index_NK.shape[1] for _ in range(10)} == {2}


@pytest.mark.parametrize(
    ("method", "changes", "words"),
    [
        ("smoe", {"top_k": 5}, "top_k is 5: at most model.experts (4)"),
        ("vqmoe", {"codes": 6}, "codes is 6: must be a multiple of model.experts (4)"),
        ("vqmoe", {"combine": "distances"}, "quantizer is nearest: must be task with combine distances"),
        ("vqmoe", {"combine": "distances", "quantizer": "task", "top_k": 4}, "top_k is 4: under model.experts (4)"),
    ],
)
def test_settings_that_do_not_fit_the_experts(method, changes, words):
    base = VQ if method == "vqmoe" else {"top_k": 2, "balance": 0.01}
    with pytest.raises(ValueError, match=words.replace("(", r"\(").replace(")", r"\)")):
        SETTINGS[method](**(base | changes)).check(4)
    with pytest.raises(ValidationError):
        SETTINGS[method](**(base | {"nonsense": 1}))


@pytest.mark.parametrize(
    ("method", "changes"),
    [("smoe", {}), ("xmoe", {}), ("vqmoe", {}), ("vmoe", {"capacity": 0.0}), ("vmoe", {"capacity": 0.5}), ("softmoe", {})],
)
def test_permuting_tokens_permutes_their_experts_and_results(monkeypatch, method, changes):
    made, (x_ND, _) = CASE.layer(method, **changes), CASE.inputs()
    if method == "vmoe":  # whose experts have a capacity in training, here without its noise
        monkeypatch.setattr(torch, "randn_like", torch.zeros_like)
        made.train()
    order = torch.randperm(12)
    for mode in made.modes:
        one, other = made(x_ND, mode, length=12), made(x_ND[order], mode, length=12)
        assert torch.equal(other.index_NK, one.index_NK[order])
        torch.testing.assert_close(other.y_ND, one.y_ND[order])


@pytest.mark.parametrize("method", SETTINGS)
def test_settings_say_whether_tokens_depend_on_others_and_on_their_ids(monkeypatch, method):
    made, (x_ND, id_N) = CASE.layer(method), CASE.inputs()
    if method == "vmoe":
        monkeypatch.setattr(torch, "randn_like", torch.zeros_like)
        made.train()
    changed_ND = torch.cat([-x_ND[:6], x_ND[6:]])
    for mode in made.modes:
        one, other = (made(x, mode, id_N, 12).y_ND[6:] for x in (x_ND, changed_ND))
        assert torch.allclose(one, other) == SECTIONS[method].causal == (method not in ("vmoe", "softmoe"))
    assert SECTIONS[method].needs_ids == (method == "stablemoe")
    if not SECTIONS[method].needs_ids:
        made(x_ND, made.modes[0], None, 12)


def test_without_a_limit_tokens_do_not_compete():
    assert SECTIONS["vmoe"].model_copy(update={"capacity": 0.0}).causal
