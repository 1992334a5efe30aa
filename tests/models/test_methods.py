"""Every method inside a whole Transformer."""

import pytest
import torch

from pipeline.models.build import build
from pipeline.moe.layer import SETTINGS
from pipeline.training import checkpoint

# Those that predict a text without reading ahead.
METHODS = [method for method in SETTINGS if method != "softmoe"]


def spec_of(tiny_spec, method, kind="language-model", **more):
    if method != "vmoe":
        return tiny_spec(method, kind, **more)
    settings = SETTINGS["vmoe"](top_k=2, balance=0.01, capacity=0.0, priority="none")
    return tiny_spec("smoe", kind, **more).model_copy(update={"method": method, "settings": settings})


def model_of(tiny_params, tiny_spec, method, *overrides):
    params = tiny_params(*overrides)
    return build(tiny_spec(method, model=params.model, settings=params.method(method)))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("norm", ["pre", "post"])
def test_trains_a_step_saves_loads_and_sees_no_future(tiny_params, tiny_spec, tmp_path, seeded, method, norm):
    section = tiny_params(f"model.norm={norm}").model
    spec = spec_of(tiny_spec, method, model=section)
    model = build(spec).train()
    model.begin_step(0.5)
    tokens_BT = torch.randint(257, (2, 20))
    hidden = model(tokens_BT, model.train_mode)
    loss = model.nats(hidden.state_BTD, tokens_BT).mean() + hidden.auxiliary()
    loss.backward()
    assert loss.isfinite()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.grad is not None)
    assert all(any(parameter.grad.any() for parameter in layer.experts.parameters()) for layer in model.moe_layers)
    checkpoint.save(tmp_path, model, spec)
    loaded = checkpoint.load(tmp_path, spec)
    model.eval()
    changed_BT = tokens_BT.clone()
    changed_BT[:, 12:] = torch.randint(257, (2, 8))
    for mode in model.modes:
        state_BTD = model(tokens_BT, mode).state_BTD
        assert torch.equal(loaded(tokens_BT, mode).state_BTD, state_BTD)
        torch.testing.assert_close(model(changed_BT, mode).state_BTD[:, :12], state_BTD[:, :12], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_right_padding_changes_nothing_for_the_classifier(tiny_params, tiny_spec, seeded, method):
    model = build(spec_of(tiny_spec, method, "classifier")).eval()
    model.backbone.begin_step(0.5)
    short_BT, mode = torch.randint(257, (1, 7)), model.backbone.infer_mode
    padded_BT = torch.cat([torch.cat([short_BT, torch.zeros(1, 9, dtype=torch.long)], 1), torch.randint(257, (1, 16))])
    alone, _ = model(short_BT, torch.tensor([7]), mode)
    together, hidden = model(padded_BT, torch.tensor([7, 16]), mode)
    torch.testing.assert_close(alone[0], together[0], atol=1e-5, rtol=1e-4)
    assert all(len(layer.index_NK) == 23 for layer in hidden.layers)


def test_without_auxiliary_losses_their_sum_is_zero(tiny_params, tiny_spec, seeded):
    hidden = model_of(tiny_params, tiny_spec, "dense")(torch.randint(257, (2, 9)), "dense")
    assert hidden.auxiliary().item() == 0.0
    assert hidden.losses() == {}


def test_the_token_ids_of_the_input_decide_in_stablemoes_second_stage(tiny_params, tiny_spec, seeded):
    model = model_of(tiny_params, tiny_spec, "stablemoe").eval()
    model.begin_step(0.1)
    tokens_BT = torch.randint(5, (3, 30))
    for layer, output in zip(model.moe_layers, model(tokens_BT, "router").layers, strict=True):
        wanted_VK = layer.router.light(torch.arange(5)).topk(2).indices
        assert torch.equal(output.index_NK, wanted_VK[tokens_BT.flatten()])
    valid_BT = torch.arange(30) < torch.tensor([30, 4, 11])[:, None]
    output = model(tokens_BT, "router", valid_BT).layers[-1]
    assert torch.equal(output.index_NK, wanted_VK[tokens_BT[valid_BT]])


def test_a_step_of_pre_training_reaches_the_routers_of_all_layers(tiny_params, tiny_spec, seeded):
    growing = model_of(tiny_params, tiny_spec, "smoe_dropout", "model.layers=3")
    growing.begin_step(0.5)
    assert [layer.router.growing for layer in growing.moe_layers] == [3, 3, 3]
    competing = model_of(tiny_params, tiny_spec, "competesmoe", "model.layers=5", "methods.competesmoe.compete=1.0")
    competing.begin_step(0.5)
    assert sum(layer.router.competing for layer in competing.moe_layers) == 3
    competing.train()(torch.randint(257, (2, 9)), "router")
    assert not any(layer.router.competing for layer in competing.moe_layers)


def test_the_released_layer_shares_its_normalisation_with_the_block(tiny_params, tiny_spec, seeded):
    model = model_of(tiny_params, tiny_spec, "vqmoe_released", "model.norm=post").eval()
    block = model.blocks[0]
    assert not [name for name in model.state_dict() if "moe_norm" in name]
    with torch.no_grad():
        block.moe.norm.bias.fill_(3.0)
    x_BTD = torch.randn(2, 9, 16)
    x_BTD, _ = block(x_BTD, x_BTD, model.rotary, torch.randint(257, (2, 9)), "discrete", None)
    torch.testing.assert_close(x_BTD.mean(-1), torch.full((2, 9), 3.0))
