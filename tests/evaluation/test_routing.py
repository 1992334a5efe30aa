import pytest
import torch

from pipeline.evaluation import routing
from pipeline.evaluation.routing import collapse
from pipeline.models.build import build
from pipeline.moe import stats
from tests.moe.reference import expert


@pytest.fixture
def tokens(seeded):
    return torch.randint(257, (5, 9))


def read(model, tokens_ST, mode, valid_ST=None):
    """Each layer's inputs and experts in one pass over all texts."""
    seen = []
    hooks = [
        layer.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0].detach(), output.index_NK)))
        for layer in model.moe_layers
    ]
    model(tokens_ST, mode, valid_ST)
    for hook in hooks:
        hook.remove()
    return seen


def measured(model, tokens_ST, mode, valid_ST=None):
    valid = torch.ones_like(tokens_ST, dtype=torch.bool) if valid_ST is None else valid_ST
    return collapse(model, lambda rows: model(tokens_ST[rows], mode, None if valid_ST is None else valid_ST[rows]), valid)


@torch.no_grad()
def naive(layer, x_ND, index_NK, some):
    """The measures of a layer from its experts, one token after another in float64."""
    made = layer.experts.double()
    y_END = torch.stack([torch.stack([expert(made, e, x_D) for x_D in x_ND[some].double()]) for e in range(made.count)])
    layer.experts.float()
    return {
        "output_cosine": pytest.approx(stats.output_cosine(y_END), abs=1e-4),
        "cka": pytest.approx(stats.cka(y_END), abs=1e-4),
        "effective_rank": pytest.approx(stats.effective_rank_by_expert(x_ND, index_NK, made.count), rel=1e-4),
    }


@pytest.mark.parametrize(("method", "mode"), [("smoe", "router"), ("vqmoe", "both"), ("vqmoe", "discrete")])
def test_all_experts_answer_what_the_layer_reads(tiny_spec, tokens, monkeypatch, method, mode):
    model = build(tiny_spec(method)).eval()
    seen = read(model, tokens, mode)
    for batch in (2, 32):
        monkeypatch.setattr(routing, "BATCH", batch)
        found = measured(model, tokens, mode)
        assert found == [naive(layer, *states, slice(None)) for layer, states in zip(model.moe_layers, seen, strict=True)]
    assert not any(layer._forward_pre_hooks for layer in model.moe_layers)


def test_tokens_are_evenly_spaced(tiny_spec, tokens, monkeypatch):
    model = build(tiny_spec("smoe")).eval()
    monkeypatch.setattr(routing, "STATES", 20)
    monkeypatch.setattr(routing, "OUTPUTS", 5)
    monkeypatch.setattr(routing, "BATCH", 2)
    states = [i * 45 // 20 for i in range(20)]
    wanted = [
        naive(layer, x_ND[states], index_NK[states], [0, 4, 8, 12, 16])
        for layer, (x_ND, index_NK) in zip(model.moe_layers, read(model, tokens, "router"), strict=True)
    ]
    assert measured(model, tokens, "router") == wanted


def test_padding_takes_no_part(tiny_spec, tokens, monkeypatch):
    model = build(tiny_spec("vqmoe")).eval()
    valid_ST = torch.arange(9) < torch.tensor([9, 2, 5, 1, 8])[:, None]
    monkeypatch.setattr(routing, "BATCH", 2)
    seen = read(model, tokens, "discrete", valid_ST)
    assert len(seen[0][0]) == 25
    wanted = [naive(layer, *states, slice(None)) for layer, states in zip(model.moe_layers, seen, strict=True)]
    assert measured(model, tokens, "discrete", valid_ST) == wanted


def test_one_expert_has_only_the_rank_of_all_states(tiny_spec, tokens):
    model = build(tiny_spec("dense")).eval()
    wanted = [{"effective_rank": pytest.approx(stats.effective_rank(x_ND))} for x_ND, _ in read(model, tokens, "dense")]
    assert measured(model, tokens, "dense") == wanted


def test_collapsed_experts_are_found(tiny_spec, tokens):
    model = build(tiny_spec("vqmoe_released")).eval()
    with torch.no_grad():
        for parameter in model.moe_layers[1].experts.parameters():
            parameter.copy_(parameter[:1].expand_as(parameter))
    apart, alike = measured(model, tokens, "discrete")
    assert alike["output_cosine"] == pytest.approx(1.0) and alike["cka"] == pytest.approx(1.0)
    assert apart["output_cosine"] < 0.9 and apart["cka"] < 0.99
