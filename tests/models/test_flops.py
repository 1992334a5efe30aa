"""FLOPs and active parameters of every method by hand: a multiply-add is two."""

import pytest
import torch
from torch._subclasses import FakeTensorMode

from pipeline.models.build import build
from pipeline.models.flops import active_parameters, count_flops, flops_per_token
from pipeline.moe.layer import SETTINGS

OF_IMAGES = {"vmoe", "softmoe"}  # see test_vit.py


def test_every_method(tiny_params, tiny_spec, seeded):
    m, length = tiny_params().model, tiny_params().model.context

    def layer(method, mode, train=False):
        """FLOPs per token of one mixture layer: those of the model without attention and output scores."""
        model = build(tiny_spec(method)).train(train)
        whole = flops_per_token(model, mode, length)
        attention = 2 * m.width * 4 * m.width + 2 * 2 * length * m.width
        return whole / m.layers - attention

    expert, router = 2 * 2 * m.width * m.expert_width, 2 * m.width * m.experts
    distances = 2 * m.width * tiny_params().method("vqmoe_released").codes
    light = 2 * tiny_params().method("stablemoe").token_width * m.experts
    small = 2 * tiny_params().method("xmoe").projection * (m.width + m.experts)
    expected = {
        ("smoe", "router"): 2 * expert + router,
        ("xmoe", "router"): 2 * expert + small,
        ("stablemoe", "router"): 2 * expert + router + light,
        ("smoe_dropout", "router"): 2 * expert + router,
        ("smoe_dropout", "dense"): m.experts * expert + router,
        ("hyperrouter", "router"): 2 * expert + router,
        ("hyperrouter", "dense"): m.experts * expert + router,
        ("competesmoe", "router"): 2 * expert + router,
        ("dense", "dense"): 2 * expert,
        ("vqmoe_released", "router"): expert + router,
        ("vqmoe_released", "discrete"): expert + distances,
        ("vqmoe_released", "both"): 2 * expert + router + distances + 2 * 2 * m.width,
    }
    assert {method for method, _ in expected} == set(SETTINGS) - {"vqmoe", *OF_IMAGES}
    for (method, mode), flops in expected.items():
        assert layer(method, mode) == pytest.approx(flops), (method, mode)
        # Counted as at inference, whatever a schedule or a competition does in training.
        assert layer(method, mode, train=True) == pytest.approx(flops), (method, mode)


def test_a_backward_pass_costs_two_forwards_and_attention_a_half_more(tiny_spec, seeded):
    # Its kernel computes the scores anew: five products where the forward has two.
    model = build(tiny_spec("smoe"))
    m, tokens_BT = tiny_spec("smoe").model, torch.randint(257, (3, 32))
    forward = flops_per_token(model, "router", 32, targets=[0])
    attention = m.layers * 2 * 2 * 32 * m.width
    flops = count_flops(lambda: model.nats(model(tokens_BT, "router").state_BTD, tokens_BT).sum().backward())
    assert flops / tokens_BT.numel() == pytest.approx(3 * forward + attention / 2)


@pytest.mark.parametrize("memory", [0, 8])
def test_all_that_is_counted_lies_where_the_model_does(tiny_params, tiny_spec, memory):
    overrides = (f"model.memory={memory}", "model.evaluate_memory=8", "model.positions=relative") if memory else ()
    spec = tiny_spec("dense", model=tiny_params(*overrides).model)
    expected = flops_per_token(build(spec), "dense", 16, memory, targets=[0, 1])
    # Tensors without values know on which device they are, which needs no GPU.
    with FakeTensorMode():
        with torch.device("cuda"):
            model = build(spec)
        assert flops_per_token(model, "dense", 16, memory, targets=[0, 1]) == expected


def test_active_parameters(tiny_params, tiny_spec, seeded):
    m = tiny_params().model
    width, hidden, experts, codes = m.width, m.expert_width, m.experts, 4
    expert = width * hidden + hidden + hidden * width + width
    router = width * experts + experts
    book, gate = codes * width, 2 * width + 2
    xmoe, stable = tiny_params().method("xmoe"), tiny_params().method("stablemoe")
    cosines = xmoe.projection * (width + experts) + 1
    light = 257 * stable.token_width + stable.token_width * experts
    digits = 2 * width + 2 + 2 * (2 * width + width)
    narrow = (width * 8 + 8) + (8 * width + width)
    released_book = tiny_params().method("vqmoe_released").codes * width
    wide = 2 * hidden
    expected = {
        ("smoe",): {"router": 2 * expert + router},
        ("smoe", "top_k=4"): {"router": 4 * expert + router},
        ("xmoe",): {"router": 2 * expert + cosines},
        ("stablemoe",): {"router": 2 * expert + experts * width + light},
        ("smoe_dropout",): {"dense": experts * expert, "router": 2 * expert},
        ("hyperrouter",): {"dense": experts * expert + width, "router": 2 * expert + width},
        ("competesmoe",): {"router": 2 * expert + width * experts},
        ("dense",): {"dense": width * wide + wide + wide * width + width},
        ("vqmoe_released",): {
            "both": 2 * expert + experts * width + released_book + gate,
            "discrete": expert + released_book,
            "router": expert + experts * width,
        },
        # The codebook decides for both paths; with each code comes an embedding.
        ("vqmoe",): {"both": 2 * expert + 2 * book, "discrete": expert + 2 * book},
        ("vqmoe", "combine=gate", "top_k=2"): {
            "both": 3 * expert + router + 2 * book + gate,
            "discrete": expert + 2 * book,
            "router": 2 * expert + router,
        },
        # Two paths cannot meet more experts than there are; moving averages are no parameters.
        ("vqmoe", "combine=sum", "top_k=4", "quantizer=ema", "input=code"): {
            "both": 4 * expert + router,
            "discrete": expert,
            "router": 4 * expert + router,
        },
        ("vqmoe", "combine=sum", "quantizer=fsq"): {
            "both": 2 * expert + router + digits,
            "discrete": expert + digits,
            "router": expert + router,
        },
        ("vqmoe", "combine=gate", "quantizer=low_dim", "input=blend"): {
            "both": 2 * expert + router + narrow + gate,
            "discrete": expert + narrow,
            "router": expert + router,
        },
    }
    assert {method for method, *_ in expected} == set(SETTINGS) - OF_IMAGES
    # Embeddings, attention, a normalisation before each part of a block and after all.
    attention = width * 3 * width + 3 * width + width * width + width
    rest = 257 * width + m.layers * (attention + 2 * 2 * width) + 2 * width
    for (method, *overrides), modes in expected.items():
        params = tiny_params(*(f"methods.{method}.{override}" for override in overrides))
        model = build(tiny_spec(method, settings=params.method(method))).train()
        layers = {mode: (active_parameters(model, mode) - rest) / m.layers for mode in model.modes}
        assert layers == modes, (method, overrides)
        assert model.training and model.moe_layers[0].training
