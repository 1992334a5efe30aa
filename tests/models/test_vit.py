"""The vision Transformer, with every method that needs no token ids."""

import copy
import math

import pytest
import torch

from pipeline.config import VisionModel
from pipeline.models.backbone import Attention
from pipeline.models.build import Spec, build
from pipeline.models.flops import active_parameters, flops_per_patch
from pipeline.moe.layer import SETTINGS
from pipeline.training import checkpoint
from pipeline.training.validation import RoutingTally
from tests.moe.compare import SECTIONS

METHODS = [method for method, section in SECTIONS.items() if not section.needs_ids]
WIDTH, PATCH, SIDE, EXPERTS, HIDDEN, DENSE = 16, 4, 3, 4, 8, 24
MODEL = VisionModel(
    layers=3,
    width=WIDTH,
    heads=2,
    head_width=10,
    experts=EXPERTS,
    expert_width=HIDDEN,
    dropout=0.0,
    patch=PATCH,
    expert_blocks=(0, 2),
    dense_width=DENSE,
    shared_width=0,
    pooling="mean",
)


def spec(method="smoe", changes=None, labels=("a", "b", "c"), **model) -> Spec:
    return Spec(
        kind="image-classifier",
        method=method,
        settings=SECTIONS[method].model_copy(update=changes or {}),
        model=MODEL.model_copy(update=model),
        channels=3,
        size=PATCH * SIDE,
        labels=labels,
    )


def vit(*args, **more):
    """A model in evaluation mode whose head says something."""
    model = build(spec(*args, **more)).eval()
    torch.nn.init.normal_(model.head.weight)
    return model


@pytest.fixture
def pixels(seeded):
    return torch.rand(5, 3, PATCH * SIDE, PATCH * SIDE)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("pooling", ["mean", "class"])
def test_every_method_learns_saves_and_loads(pixels, tmp_path, method, pooling):
    described = spec(method, pooling=pooling, shared_width=8)
    model, label_B = build(described).train(), torch.tensor([0, 1, 2, 1, 1])
    model.normalise_by((0.4, 0.5, 0.6), (0.2, 0.3, 0.3))
    optimizer, losses = torch.optim.Adam(model.parameters(), lr=0.01), []
    for step in range(12):
        model.begin_step(step / 12)
        scores_BL, hidden = model(pixels, model.train_mode)
        losses.append(torch.nn.functional.cross_entropy(scores_BL, label_B))
        optimizer.zero_grad()
        (losses[-1] + hidden.auxiliary()).backward()
        optimizer.step()
    assert losses[0].item() == pytest.approx(math.log(3))  # a fresh head knows nothing
    assert losses[-1] < 0.7 * losses[0]
    assert all(any(parameter.grad.any() for parameter in layer.experts.parameters()) for layer in model.moe_layers)
    checkpoint.save(tmp_path, model, described)
    loaded = checkpoint.load(tmp_path, described)
    model.eval()
    for mode in model.modes:
        assert torch.equal(loaded(pixels, mode)[0], model(pixels, mode)[0])


def test_patches_are_cut_row_by_row(pixels):
    model, seen = vit(), []
    model.dropout.register_forward_hook(lambda _, inputs, output: seen.append(output))
    model(pixels, "router")
    weight_DCHW, bias_D = model.embedding.weight.double(), model.embedding.bias.double()
    for r in range(SIDE):
        for c in range(SIDE):
            cut_BCHW = pixels[:, :, r * PATCH : (r + 1) * PATCH, c * PATCH : (c + 1) * PATCH]
            wanted_BD = torch.stack([(cut_BCHW * row).sum((1, 2, 3)) for row in weight_DCHW], 1) + bias_D
            place = r * SIDE + c
            torch.testing.assert_close(seen[0][:, place].double(), wanted_BD + model.positions_TD[place], atol=1e-5, rtol=1e-4)
    assert model.grid == (SIDE, SIDE)


def test_attention_to_all_positions_against_loops(seeded):
    made = Attention(6, 2, 3, causal=False).double()
    x_TD = torch.randn(5, 6, dtype=torch.double)
    q_TD, k_TD, v_TD = made.qkv(x_TD).chunk(3, dim=-1)
    rows = []
    for t in range(5):
        heads = []
        for part in (slice(0, 3), slice(3, 6)):
            weights = [(q_TD[t, part] @ k_TD[s, part] / math.sqrt(3)).exp() for s in range(5)]
            heads.append(sum(w * v_TD[s, part] for s, w in enumerate(weights)) / sum(weights))
        rows.append(torch.cat(heads))
    torch.testing.assert_close(made(x_TD[None], None)[0], made.project(torch.stack(rows)))


@pytest.mark.parametrize("pooling", ["mean", "class"])
def test_the_head_reads_the_class_token_or_the_mean(pixels, pooling):
    model = vit(pooling=pooling)
    scores_BL, hidden = model(pixels, "router")
    tokens = SIDE * SIDE + (pooling == "class")
    assert hidden.state_BTD.shape == (5, tokens, WIDTH)
    torch.testing.assert_close(hidden.state_BTD.mean(-1), torch.zeros(5, tokens), atol=1e-5, rtol=0)
    read_BD = hidden.state_BTD.mean(1) if pooling == "mean" else hidden.state_BTD[:, 0]
    torch.testing.assert_close(scores_BL, model.head(read_BD))
    index_NK = hidden.layers[1].index_NK
    assert index_NK.shape == (5 * tokens, 2)
    index_BPK = model.patches(index_NK)
    assert index_BPK.shape == (5, SIDE * SIDE, 2)
    assert torch.equal(index_BPK[3, -1], index_NK[4 * tokens - 1])
    assert torch.equal(index_BPK[3, 0], index_NK[3 * tokens + (pooling == "class")])


def test_only_the_named_blocks_have_experts(pixels):
    model = vit("vqmoe")
    assert model.moe_layers == [model.blocks[0].moe, model.blocks[2].moe]
    assert [block.moe.experts.count for block in model.blocks] == [EXPERTS, 1, EXPERTS]
    assert model.blocks[1].moe.experts.w1.weight.shape == (DENSE, WIDTH)
    assert (model.modes, model.train_mode, model.infer_mode) == (("both", "discrete"), "both", "discrete")
    tally = RoutingTally(model)
    seen = []
    for block in model.blocks:
        block.moe.register_forward_hook(lambda _, inputs, output: seen.append(output.index_NK))
    _, hidden = model(pixels, "discrete")
    assert [layer.index_NK.data_ptr() for layer in hidden.layers] == [seen[0].data_ptr(), seen[2].data_ptr()]
    tally(hidden)
    assert [len(share) for share in tally.expert_shares()] == [EXPERTS, EXPERTS]
    alone = vit(expert_blocks=(1,))
    assert [block.moe.experts.count for block in alone.blocks] == [1, EXPERTS, 1]


def test_a_shared_expert_adds_its_answer_in_blocks_with_experts(pixels):
    model = vit(shared_width=8)
    assert [block.shared is None for block in model.blocks] == [False, True, False]
    block, x_BTD = model.blocks[2], torch.randn(2, 9, WIDTH)
    assert block.shared.w1.weight.shape == (8, WIDTH)
    with_it, _ = block(x_BTD, x_BTD, None, None, "router", None)
    without = copy.deepcopy(block)
    without.shared = None
    plain, _ = without(x_BTD, x_BTD, None, None, "router", None)
    attended_BTD = x_BTD + block.attention(block.attention_norm(x_BTD), None)
    torch.testing.assert_close(with_it - plain, block.shared(block.moe_norm(attended_BTD)), atol=1e-5, rtol=1e-4)


def test_pixels_are_normalised_by_channel(pixels):
    model, mean, deviation = vit(), torch.tensor([0.1, 0.5, 0.7]), torch.tensor([0.2, 0.5, 0.1])
    wanted, _ = model((pixels - mean[:, None, None]) / deviation[:, None, None], "router")
    model.normalise_by(mean.tolist(), deviation)
    torch.testing.assert_close(model(pixels, "router")[0], wanted)
    model.normalise_by(mean, (0.0, 0.5, 0.1))
    assert model(pixels, "router")[0].isfinite().all()


def test_a_gradient_reaches_the_pixels(pixels):
    model = vit("vqmoe")
    pixels.requires_grad_()
    model(pixels, "both")[0].square().sum().backward()
    assert (pixels.grad != 0).double().mean() > 0.9


@pytest.mark.parametrize(
    ("method", "changes"), [("smoe", {}), ("xmoe", {}), ("vqmoe", {}), ("softmoe", {}), ("vmoe", {"capacity": 0.0})]
)
@pytest.mark.parametrize("pooling", ["mean", "class"])
def test_without_positions_permuted_patches_stay_what_they_are(pixels, method, changes, pooling):
    model, order = vit(method, changes, pooling=pooling), torch.randperm(SIDE * SIDE)
    first = int(pooling == "class")
    cut = pixels.unflatten(3, (SIDE, PATCH)).unflatten(2, (SIDE, PATCH)).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
    permuted = cut[:, order].unflatten(1, (SIDE, SIDE)).permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)
    place = torch.cat([torch.zeros(first, dtype=torch.long), order + first])
    for positioned in (True, False):
        if not positioned:
            torch.nn.init.zeros_(model.positions_TD)
        for mode in model.modes:
            (scores_BL, one), (other_BL, other) = model(pixels, mode), model(permuted, mode)
            same = torch.allclose(scores_BL, other_BL, atol=1e-5)
            assert same == (not positioned)
            if same:
                torch.testing.assert_close(other.state_BTD, one.state_BTD[:, place], atol=1e-5, rtol=1e-4)
                for before, after in zip(one.layers, other.layers, strict=True):
                    assert torch.equal(model.patches(after.index_NK), model.patches(before.index_NK)[:, order])


def test_a_fresh_head_on_the_same_backbone(pixels):
    old, new = vit("vqmoe", pooling="class"), build(spec("vqmoe", pooling="class", labels=("x", "y"))).eval()
    old.normalise_by((0.1, 0.2, 0.3), (0.5, 0.5, 0.5))
    old.moe_layers[0].freeze_assignment()
    new.load_backbone(old)
    scores_BL, hidden = new(pixels, "discrete")
    assert scores_BL.shape == (5, 2) and not scores_BL.any()
    assert torch.equal(hidden.state_BTD, old(pixels, "discrete")[1].state_BTD)
    assert not new.moe_layers[0].quantizer.codebook_CD.requires_grad
    assert new.moe_layers[1].quantizer.codebook_CD.requires_grad


def test_experts_that_are_full_turn_patches_away(pixels):
    model = vit("vmoe", {"capacity": 0.5})
    for layer in model(pixels, "router")[1].layers:
        assert "dropped" not in layer.losses and (layer.index_NK >= 0).all()
    for layer in model.train()(pixels, "router")[1].layers:
        share = (layer.index_NK < 0).double().mean().item()
        assert 0.4 < share < 0.8
        assert layer.losses["dropped"].value.item() == pytest.approx(share)
    assert "dropped" not in vit("vmoe", {"capacity": 0.0}).train()(pixels, "router")[1].layers[0].losses


def test_the_answer_to_an_image_does_not_depend_on_its_neighbours(pixels):
    for method in ("vmoe", "softmoe", "smoe", "vqmoe"):
        model = vit(method)
        mode = model.infer_mode
        alone = torch.cat([model(image_CHW[None], mode)[1].state_BTD for image_CHW in pixels])
        torch.testing.assert_close(alone, model(pixels, mode)[1].state_BTD, rtol=1e-4, atol=1e-5)


def by_hand(model, layer, pooling="mean"):
    """FLOPs per patch of a model whose mixture layers take this many per token."""
    patches = SIDE * SIDE
    tokens, inner = patches + (pooling == "class"), 2 * 10
    attention = 4 * 2 * WIDTH * inner + 2 * 2 * tokens * inner
    per_token = 3 * attention + 2 * 2 * WIDTH * DENSE + 2 * layer
    return (tokens * per_token + patches * 2 * 3 * PATCH**2 * WIDTH + 2 * WIDTH * 3) / patches


@pytest.mark.parametrize("pooling", ["mean", "class"])
def test_flops_by_hand(pixels, pooling):
    tokens = SIDE * SIDE + (pooling == "class")
    expert, router, slots = 2 * 2 * WIDTH * HIDDEN, 2 * WIDTH * EXPERTS, 2 * EXPERTS
    wanted = {
        "smoe": 2 * expert + router,
        "dense": 2 * expert,
        "vmoe": 2 * expert + router,
        # Scores, both mixes, and the experts' answers to all slots of an image.
        "softmoe": 3 * 2 * WIDTH * slots + slots * expert / tokens,
    }
    for method, layer in wanted.items():
        model = vit(method, {"capacity": 0.0} if method == "vmoe" else None, pooling=pooling).train()
        assert flops_per_patch(model, model.infer_mode) == pytest.approx(by_hand(model, layer, pooling)), method
        assert model.training
    shared = vit(pooling=pooling, shared_width=8)
    layer = wanted["smoe"] + 2 * 2 * WIDTH * 8
    assert flops_per_patch(shared, "router") == pytest.approx(by_hand(shared, layer, pooling))


def test_active_parameters_by_hand():
    expert = 2 * WIDTH * HIDDEN + HIDDEN + WIDTH
    attention = 3 * (WIDTH * 20 + 20) + 20 * WIDTH + WIDTH
    dense = 2 * WIDTH * DENSE + DENSE + WIDTH
    rest = 3 * PATCH**2 * WIDTH + WIDTH + SIDE * SIDE * WIDTH + 3 * (attention + 4 * WIDTH) + dense + 2 * WIDTH + 3 * WIDTH + 3
    wanted = {
        "smoe": 2 * expert + EXPERTS * (WIDTH + 1),
        "vmoe": 2 * expert + EXPERTS * WIDTH,
        "softmoe": EXPERTS * expert + 2 * EXPERTS * WIDTH + 1,
    }
    for method, layer in wanted.items():
        model = vit(method)
        assert active_parameters(model, "router") == rest + 2 * layer, method
    shared = vit(shared_width=8, pooling="class")
    more = 2 * (2 * WIDTH * 8 + 8 + WIDTH) + 2 * WIDTH
    assert active_parameters(shared, "router") == rest + 2 * wanted["smoe"] + more


def test_what_fits_images_is_all_but_what_reads_ids():
    assert set(SETTINGS) - set(METHODS) == {"stablemoe"}
