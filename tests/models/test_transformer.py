import math

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from pipeline.errors import UsageError
from pipeline.models.build import Spec, build
from pipeline.models.flops import flops_per_token
from pipeline.models.heads import Classifier
from pipeline.models.transformer import Rotary
from pipeline.moe import dispatch

POSITIONS = ["rotary", "learned", "relative"]


def spec(params, method="vqmoe", **model) -> Spec:
    section = params.model.model_copy(update=model)
    return Spec(kind="language-model", method=method, settings=params.method(method), model=section, vocabulary=50)


@pytest.mark.parametrize("method", ["vqmoe", "smoe"])
@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("positions", POSITIONS)
def test_no_position_sees_what_follows(tiny_params, seeded, method, norm, positions):
    model = build(spec(tiny_params(), method, norm=norm, positions=positions)).eval()
    tokens_BT = torch.randint(50, (2, 20))
    changed_BT = tokens_BT.clone()
    changed_BT[:, 12:] = torch.randint(50, (2, 8))
    for mode in model.modes:
        one, other = model(tokens_BT, mode).state_BTD, model(changed_BT, mode).state_BTD
        torch.testing.assert_close(one[:, :12], other[:, :12], atol=1e-5, rtol=1e-4)
        assert not torch.allclose(one[:, 12:], other[:, 12:])


@pytest.mark.parametrize("positions", POSITIONS)
def test_order_matters(tiny_params, seeded, positions):
    model = build(spec(tiny_params(), "smoe", positions=positions)).eval()
    tokens_BT = torch.randint(50, (1, 10))
    swapped_BT = tokens_BT[:, [1, 0, *range(2, 10)]]
    assert not torch.allclose(
        model(tokens_BT, "router").state_BTD[:, -1], model(swapped_BT, "router").state_BTD[:, -1], atol=1e-5
    )


def test_rotary_products_depend_on_distance_only(seeded):
    rotary, x = Rotary(8, 30), torch.randn(8)
    turned = rotary(x.expand(1, 30, 1, 8))[0, :, 0]
    products = [float(turned[i] @ turned[i + 3]) for i in range(20)]
    assert max(products) - min(products) < 1e-4
    assert abs(float(turned[0] @ turned[4]) - products[0]) > 1e-3


@pytest.mark.parametrize("pooling", ["last", "mean"])
@pytest.mark.parametrize("positions", POSITIONS)
def test_right_padding_changes_nothing_for_the_classifier(tiny_params, seeded, pooling, positions):
    head = {"kind": "classifier", "labels": ("a", "b", "c"), "pooling": pooling, "head_dropout": 0.1}
    model = build(spec(tiny_params(), positions=positions).model_copy(update=head)).eval()
    short_BT = torch.randint(50, (1, 7))
    padded_BT = torch.cat([short_BT, torch.zeros(1, 9, dtype=torch.long)], 1)
    both_BT = torch.cat([padded_BT, torch.randint(50, (1, 16))])
    alone, _ = model(short_BT, torch.tensor([7]), "discrete")
    together, hidden = model(both_BT, torch.tensor([7, 16]), "discrete")
    torch.testing.assert_close(alone[0], together[0], atol=1e-5, rtol=1e-4)
    # Padding reaches no expert: it would count in load, codebook and balance.
    assert all(len(layer.index_NK) == 23 for layer in hidden.layers)


@pytest.mark.parametrize("method", ["vqmoe", "vqmoe_released", "smoe", "stablemoe", "dense"])
@pytest.mark.parametrize("norm", ["pre", "post"])
def test_texts_of_many_lengths_in_bfloat16(tiny_params, seeded, monkeypatch, method, norm):
    """As on a GPU, but on a CPU: experts in groups, products in bfloat16, the residual stream in float32."""
    monkeypatch.setattr(dispatch, "each_expert", dispatch.grouped)
    language = build(spec(tiny_params(), method, norm=norm))
    model = Classifier(language, 3, "mean", 0.0).eval()
    tokens_BT, lengths_B = torch.randint(50, (3, 12)), torch.tensor([12, 5, 9])
    exact_BL, _ = model(tokens_BT, lengths_B, language.infer_mode)
    with torch.autocast("cpu", torch.bfloat16):
        scores_BL, _ = model(tokens_BT, lengths_B, language.infer_mode)
        scores_BL.sum().backward()
    torch.testing.assert_close(scores_BL.float(), exact_BL, atol=0.1, rtol=0.1)


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


@pytest.mark.parametrize("method", ["vqmoe", "smoe"])
@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("positions", POSITIONS)
def test_steps_lower_the_loss_with_heads_of_any_width(tiny_params, seeded, method, norm, positions):
    model = build(spec(tiny_params(), method, norm=norm, positions=positions, heads=3, head_width=10)).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    tokens_BT = torch.randint(50, (2, 21))
    losses, memory = [], None
    for _ in range(8):
        hidden = model(tokens_BT[:, :-1], model.train_mode, memory=memory)
        memory = hidden.memory(6) if positions == "relative" else None
        losses.append(model.nats(hidden.state_BTD, tokens_BT[:, 1:]).mean())
        optimizer.zero_grad()
        (losses[-1] + hidden.auxiliary()).backward()
        optimizer.step()
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("method", ["vqmoe", "smoe"])
@pytest.mark.parametrize("norm", ["pre", "post"])
def test_segments_with_memory_of_all_before_score_as_the_whole_text(tiny_params, seeded, method, norm):
    model = build(spec(tiny_params(), method, norm=norm, positions="relative", layers=3)).eval()
    tokens_BT = torch.randint(50, (2, 37))
    whole_BT = model.nats(model(tokens_BT[:, :-1], model.infer_mode).state_BTD, tokens_BT[:, 1:])
    for length, enough in ((36, True), (8, False)):
        parts, memory = [], None
        for first in range(0, 36, 10):
            segment_BT = tokens_BT[:, first : first + 11]
            hidden = model(segment_BT[:, :-1], model.infer_mode, memory=memory)
            memory = hidden.memory(length)
            parts.append(model.nats(hidden.state_BTD, segment_BT[:, 1:]))
        same = torch.isclose(torch.cat(parts, 1), whole_BT, atol=1e-5, rtol=1e-5)
        assert same[:, :10].all()
        assert same.all() if enough else same[:, 20:].double().mean() < 0.5


def test_a_memory_longer_than_there_is_text_is_what_there_is_and_none_is_none(tiny_params, seeded):
    hidden = build(spec(tiny_params(), "smoe", positions="relative"))(torch.randint(50, (2, 5)), "router")
    assert [state.shape[1] for state in hidden.memory(9)] == [5, 5]
    assert hidden.memory(0) is None


def test_no_gradient_reaches_the_memory(tiny_params, seeded):
    model = build(spec(tiny_params(), "smoe", positions="relative"))
    past = model(torch.tensor([[1, 2, 3]]), "router").memory(3)
    model(torch.tensor([[4, 5]]), "router", memory=past).state_BTD.square().sum().backward()
    reached = model.embedding.weight.grad.abs().sum(1).nonzero().flatten()
    assert reached.tolist() == [4, 5]


def test_tied_scores(tiny_params, seeded):
    model = build(spec(tiny_params())).double()
    assert [name for name, weight in model.named_parameters() if 50 in weight.shape] == ["embedding.weight"]
    state_BTD = torch.randn(2, 3, 16, dtype=torch.double)
    target_BT = torch.tensor([[4, -1, 0], [-1, 49, 4]])
    found = model.nats(state_BTD, target_BT)
    for b, t in torch.cartesian_prod(torch.arange(2), torch.arange(3)):
        scores = [float(state_BTD[b, t] @ weight) for weight in model.embedding.weight.detach()]
        wanted = math.log(sum(map(math.exp, scores))) - scores[target_BT[b, t]] if target_BT[b, t] >= 0 else 0
        assert found[b, t].item() == pytest.approx(wanted)


def adaptive(params, vocabulary, cutoffs, **model):
    described = spec(params, cutoffs=cutoffs, **model)
    return build(described.model_copy(update={"vocabulary": vocabulary}))


def test_adaptive_scores_are_a_distribution_and_equal_loops(tiny_params, seeded):
    model = adaptive(tiny_params(), 50, (10, 30)).double()
    state_D = torch.randn(16, dtype=torch.double)
    found = model.nats(state_D.expand(2, 25, 16), torch.arange(50).view(2, 25)).flatten()
    assert (-found).exp().sum().item() == pytest.approx(1)
    # The head scores ten tokens and two clusters; a cluster's tokens share its probability by scores of their own.
    head, tails = model.adaptive.head, model.adaptive.tail
    assert [tail[0].out_features for tail in tails] == [4, 1]

    def log_softmax(scores):
        scores = scores.tolist()
        return [score - math.log(sum(map(math.exp, scores))) for score in scores]

    top = log_softmax(head.weight @ state_D)
    wanted = top[:10]
    for cluster, (down, up) in enumerate(tails):
        wanted += [top[10 + cluster] + value for value in log_softmax(up.weight @ (down.weight @ state_D))]
    assert found.tolist() == pytest.approx([-value for value in wanted])


def test_adaptive_scores_leave_out_what_has_no_target(tiny_params, seeded):
    model = adaptive(tiny_params(), 50, (10, 30))
    state_BTD = torch.randn(2, 3, 16, requires_grad=True)
    target_BT = torch.tensor([[-1, 45, 3], [12, -1, -1]])
    found = model.nats(state_BTD, target_BT)
    alone = [model.nats(state_BTD[b, t][None], target_BT[b, t][None]).item() for b, t in ((0, 1), (0, 2), (1, 0))]
    assert found.flatten().tolist() == pytest.approx([0, *alone, 0, 0])
    found.sum().backward()
    assert ((state_BTD.grad.abs().sum(-1) > 0) == (target_BT >= 0)).all()
    assert model.nats(state_BTD, torch.full((2, 3), -1)).tolist() == [[0, 0, 0], [0, 0, 0]]


def test_cutoffs_beyond_the_vocabulary(tiny_params):
    with pytest.raises(UsageError, match=r"model\.cutoffs ends with 50: must lie below the vocabulary of 50 tokens"):
        adaptive(tiny_params(), 50, (10, 50))


def test_adaptive_scores_keep_far_less_for_the_backward_pass(tiny_params, seeded):
    def saved(model):
        """Bytes of the largest tensor that is kept, parameters aside, for targets whose frequency falls with their rank."""
        sizes = []
        target_N = (50_000 ** torch.rand(64)).long() - 1
        own = {weight.data_ptr() for weight in model.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: (sizes.append(0 if tensor.data_ptr() in own else tensor.nbytes), tensor)[1], lambda tensor: tensor
        ):
            model.nats(torch.randn(64, 16, requires_grad=True), target_N)
        return max(sizes)

    full, less = (saved(adaptive(tiny_params(), 50_000, cutoffs)) for cutoffs in ((), (2_000, 10_000)))
    assert full >= 64 * 50_000 * 4
    assert less < full / 5


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
        assert flops_per_token(routed, "router", length, targets=[1]) == m.layers * (attention + 2 * expert + router) + scores
    assert flops_per_token(routed, "router", length, targets=[1]) == m.layers * (attention + 2 * expert + router) + scores
    # The codebook decides for both paths; with a router of its own the routed one costs that too.
    assert flops_per_token(discrete, "both", length) == m.layers * (attention + 2 * expert + distances)
    own = build(spec(tiny_params("methods.vqmoe.combine=sum"), "vqmoe"))
    assert flops_per_token(own, "both", length) == m.layers * (attention + 2 * expert + router + distances)
    assert flops_per_token(discrete, "discrete", length) == m.layers * (attention + expert + distances)
    assert flops_per_token(discrete, "discrete", length, targets=[1, 2]) == m.layers * (attention + expert + distances) + scores


def test_flops_of_relative_attention_by_hand(tiny_params, seeded):
    params = tiny_params()
    m, length, memory = params.model, params.model.context, 24
    model = build(spec(params, "smoe", positions="relative", head_width=10))
    inner, keys = 10 * m.heads, length + memory
    # Queries and what follows attention for the new tokens, keys and values for the memory's too.
    projections = 2 * m.width * inner * (2 + 2 * keys / length)
    by_content, by_position, values = (2 * inner * many for many in (keys, keys + 1, keys))
    moe = 2 * 2 * 2 * m.width * m.expert_width + 2 * m.width * m.experts
    wanted = m.layers * (projections + by_content + by_position + values + moe)
    assert flops_per_token(model, "router", length, memory) == wanted
    with sdpa_kernel(SDPBackend.MATH):
        assert flops_per_token(model, "router", length, memory) == wanted


def test_flops_of_adaptive_scores_are_the_mean_over_the_targets(tiny_params, seeded):
    params = tiny_params()
    model = adaptive(params, 50, (10, 30))
    without = flops_per_token(model, "discrete", 32)
    head, first, second = 2 * 16 * (10 + 2), 2 * (16 * 4 + 4 * 20), 2 * (16 * 1 + 1 * 20)
    assert flops_per_token(model, "discrete", 32, targets=[0, 9]) == without + head
    assert flops_per_token(model, "discrete", 32, targets=[3, 10, 29, 49]) == without + head + (2 * first + second) / 4


@pytest.mark.parametrize("cutoffs", [[], [10, 30]])
def test_all_next_tokens_have_the_scores_of_each(tiny_params, seeded, cutoffs):
    model = build(spec(tiny_params(), cutoffs=cutoffs))
    state_ND = torch.randn(7, model.width)
    score_NV = model.next_token(state_ND)
    for token in range(50):
        torch.testing.assert_close(score_NV[:, token], -model.nats(state_ND, torch.full((7,), token)))
