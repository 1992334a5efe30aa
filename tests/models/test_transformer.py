import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from pipeline.models.build import Spec, build
from pipeline.models.flops import flops_per_token
from pipeline.models.transformer import Rotary


def spec(params, method="vqmoe", **model) -> Spec:
    section = params.model.model_copy(update=model)
    return Spec(kind="language-model", method=method, settings=params.method(method), model=section, vocabulary=50)


@pytest.mark.parametrize("method", ["vqmoe", "smoe"])
@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("positions", ["rotary", "learned"])
def test_no_position_sees_what_follows(tiny_params, seeded, method, norm, positions):
    model = build(spec(tiny_params(), method, norm=norm, positions=positions)).eval()
    tokens_BT = torch.randint(50, (2, 20))
    changed_BT = tokens_BT.clone()
    changed_BT[:, 12:] = torch.randint(50, (2, 8))
    for mode in {model.train_mode, model.infer_mode}:
        one, other = model(tokens_BT, mode).state_BTD, model(changed_BT, mode).state_BTD
        torch.testing.assert_close(one[:, :12], other[:, :12], atol=1e-5, rtol=1e-4)
        assert not torch.allclose(one[:, 12:], other[:, 12:])


@pytest.mark.parametrize("positions", ["rotary", "learned"])
def test_order_matters(tiny_params, seeded, positions):
    model = build(spec(tiny_params(), "smoe", positions=positions)).eval()
    tokens_BT = torch.randint(50, (1, 10))
    swapped_BT = tokens_BT[:, [1, 0, *range(2, 10)]]
    assert not torch.allclose(
        model(tokens_BT, "router").state_BTD[:, -1], model(swapped_BT, "router").state_BTD[:, -1], atol=1e-5
    )


def test_rotary_products_depend_on_distance_only(seeded):
    rotary, x = Rotary(8, 30), torch.randn(8)
    turned = rotary(x.expand(30, 8))
    products = [float(turned[i] @ turned[i + 3]) for i in range(20)]
    assert max(products) - min(products) < 1e-4
    assert abs(float(turned[0] @ turned[4]) - products[0]) > 1e-3


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_right_padding_changes_nothing_for_the_classifier(tiny_params, seeded, pooling):
    params = tiny_params()
    model = build(
        spec(params).model_copy(update={"kind": "classifier", "labels": ("a", "b", "c"), "pooling": pooling, "head_dropout": 0.1})
    ).eval()
    short_BT = torch.randint(50, (1, 7))
    padded_BT = torch.cat([short_BT, torch.zeros(1, 9, dtype=torch.long)], 1)
    both_BT = torch.cat([padded_BT, torch.randint(50, (1, 16))])
    alone, _ = model(short_BT, torch.tensor([7]), "discrete")
    together, hidden = model(both_BT, torch.tensor([7, 16]), "discrete")
    torch.testing.assert_close(alone[0], together[0], atol=1e-5, rtol=1e-4)
    # Padding reaches no expert: it would count in load, codebook and balance.
    assert all(len(layer.index_NK) == 23 for layer in hidden.layers)


def test_auxiliary_loss_is_the_weighted_sum_over_layers(tiny_params, seeded):
    model = build(spec(tiny_params("methods.vqmoe.drop_routed=0"))).train()
    hidden = model(torch.randint(50, (2, 16)), "both")
    settings = model.moe_layers[0].settings
    by_hand = sum(
        settings.balance * layer.losses["balance"].value
        + settings.beta * (layer.losses["codebook"].value + settings.commitment * layer.losses["commitment"].value)
        for layer in hidden.layers
    )
    torch.testing.assert_close(hidden.auxiliary(), by_hand)
    assert hidden.losses()["balance"] >= 0.9


def test_flops_by_hand(tiny_params, seeded):
    params = tiny_params()
    m, length = params.model, params.model.context
    routed, discrete = build(spec(params, "smoe")), build(spec(params, "vqmoe"))
    attention = 2 * m.width * 4 * m.width + 2 * 2 * length * m.width
    expert = 2 * 2 * m.width * m.expert_width
    scores = 2 * m.width * 50
    router = 2 * m.width * m.experts
    distances = 2 * m.width * params.method("vqmoe").codes
    with sdpa_kernel(SDPBackend.MATH):
        assert flops_per_token(routed, "router", length) == m.layers * (attention + 2 * expert + router) + scores
    assert flops_per_token(routed, "router", length) == m.layers * (attention + 2 * expert + router) + scores
    assert flops_per_token(discrete, "both", length) == m.layers * (attention + 2 * expert + router + distances) + scores
    assert flops_per_token(discrete, "discrete", length, next_token=False) == m.layers * (attention + expert + distances)
    assert flops_per_token(discrete, "discrete", length) == m.layers * (attention + expert + distances) + scores
