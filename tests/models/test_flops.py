"""FLOPs of every method by hand: a multiply-add is two."""

import pytest

from pipeline.models.build import build
from pipeline.models.flops import flops_per_token
from pipeline.moe.layer import SETTINGS


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
    assert {method for method, _ in expected} == set(SETTINGS) - {"vqmoe"}
    for (method, mode), flops in expected.items():
        assert layer(method, mode) == pytest.approx(flops), (method, mode)
        # Counted as at inference, whatever a schedule or a competition does in training.
        assert layer(method, mode, train=True) == pytest.approx(flops), (method, mode)
