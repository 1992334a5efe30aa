"""What holds for every quantizer, by itself and inside VQMoE."""

import copy
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.moe.layer import SETTINGS, build_layer
from pipeline.moe.quantizers import QUANTIZERS
from pipeline.moe.routers.base import Sizes
from tests.moe.compare import assert_same_gradients, over_cases
from tests.moe.quantizers import reference
from tests.moe.test_layer import VQ

EVERY = pytest.mark.parametrize("name", QUANTIZERS)


def quantizer(name, codes=4, width=6, dead_share=0.5):
    return QUANTIZERS[name](SimpleNamespace(codes=codes, dead_share=dead_share, code_width=3), width)


def layer(name, **changes):
    settings = SETTINGS["vqmoe"](**(VQ | {"quantizer": name} | changes))
    return build_layer("vqmoe", settings, Sizes(8, 4, 12, vocabulary=7, dropout=0.0))


def blobs(each=50):
    """Tokens around four centres that every variant can tell apart, by distance, direction, in a plane and by halves."""
    centres = torch.tensor([[6.0, 3, 0, 0, 0, 0], [6, -3, 0, 0, 0, 0], [-6, 3, 0, 0, 0, 0], [-6, -3, 0, 0, 0, 0]])
    return centres.repeat_interleave(each, 0) + 0.1 * torch.randn(4 * each, 6, generator=torch.Generator().manual_seed(0))


def kill(made):
    """Leave a code without tokens: none is near it, or a digit has one level only."""
    with torch.no_grad():
        if hasattr(made, "codebook_CD"):
            made.codebook_CD[2] = 1000 * torch.eye(made.codebook_CD.shape[1])[-1]
        else:
            made.down.bias[0] = -1000.0


def state(module):
    return {key: tensor.clone() for key, tensor in module.state_dict().items()}


def decides(key):
    """Whether a layer's codes depend on this part of its state."""
    return key.startswith("quantizer.") and not key.startswith("quantizer.embedding.")


def assert_same(one, other):
    assert one.keys() == other.keys()
    for key in one:
        assert torch.equal(one[key], other[key]), key


def train(made, steps):
    """Training steps of a layer on tokens and upstream gradients from torch's generator."""
    optimizer = torch.optim.AdamW(made.parameters(), lr=0.01)
    for _ in range(steps):
        output = made.train()(torch.randn(40, 8), "both")
        optimizer.zero_grad()
        auxiliary = sum(loss.weight * loss.value for loss in output.losses.values())
        ((output.y_ND * torch.randn(40, 8)).sum() + auxiliary).backward()
        optimizer.step()


@EVERY
def test_nearest_code_against_loops_in_its_own_space(name, seeded):
    made = quantizer(name, codes=12)
    x_ND = torch.randn(60, 6)
    exact = copy.deepcopy(made).double()
    codes = [reference.code(exact, x_D) for x_D in x_ND.double()]
    assert made.nearest(x_ND).tolist() == made.eval()(x_ND).code_N.tolist() == codes
    assert len(set(codes)) > 3


@EVERY
@pytest.mark.parametrize("source", ["code", "blend", "residual"])
@pytest.mark.parametrize(("mode", "naive"), [("both", reference.both), ("discrete", reference.discrete)])
@over_cases
def test_vqmoe_matches_the_loops(name, source, mode, naive, case):
    made = case.layer("vqmoe", quantizer=name, codes=2 * case.experts, code_width=3, input=source, combine="sum")
    exact = copy.deepcopy(made).double()
    fast_x = case.inputs()[0].requires_grad_()
    exact_x = fast_x.detach().double().requires_grad_()
    fast, slow = made(fast_x, mode), naive(exact, exact_x)
    torch.testing.assert_close(fast.y_ND.double(), slow, atol=1e-4, rtol=1e-3)
    found = {kind: loss.value for kind, loss in fast.losses.items() if kind != "balance"}
    wanted = reference.losses(exact.quantizer, exact_x)
    assert found.keys() == wanted.keys()
    upstream = torch.randn_like(slow)
    for kind in wanted:
        torch.testing.assert_close(found[kind].double(), wanted[kind], atol=1e-4, rtol=1e-3)
    ((fast.y_ND * upstream.float()).sum() + 30 * sum(found.values())).backward()
    ((slow * upstream).sum() + 30 * sum(wanted.values())).backward()
    assert_same_gradients(made, fast_x, exact, exact_x)


@EVERY
def test_what_it_returns(name, seeded):
    made, x_ND = quantizer(name), torch.randn(30, 6, requires_grad=True)
    answer = made.train()(x_ND)
    assert answer.value().shape == x_ND.shape
    torch.testing.assert_close(answer.error, (answer.value() - x_ND).detach().square().mean())
    assert not answer.error.requires_grad
    assert all(loss.requires_grad and loss > 0 for loss in answer.losses.values())
    assert (answer.weight_N1 is not None) is (name == "task")
    assert (answer.scores_NC is not None) is (name != "fsq")
    if answer.scores_NC is not None:
        assert answer.scores_NC.shape == (30, 4)
        assert torch.equal(answer.scores_NC.argmax(1), answer.code_N)
    if answer.weight_N1 is not None:
        assert torch.equal(answer.weight_N1, torch.ones(30, 1))
    assert (answer.embedding_ND is not None) is made.embeds is (name == "fsq")


@EVERY
def test_the_first_training_batch_starts_it_and_evaluation_moves_nothing(name, seeded):
    made, x_ND = quantizer(name), blobs()
    before = state(made)
    made.eval()(x_ND)
    assert_same(state(made), before)
    made.train()(x_ND)
    assert made.started
    codes = made.nearest(x_ND).view(4, 50)
    assert (codes == codes[:, :1]).all()
    assert codes[:, 0].sort().values.tolist() == [0, 1, 2, 3]
    before = state(made)
    made.eval()(torch.randn(50, 6))
    assert_same(state(made), before)


@EVERY
@pytest.mark.parametrize("tokens", [torch.ones(1, 6), torch.ones(50, 6)])
def test_too_few_or_constant_tokens(name, tokens, seeded):
    made = quantizer(name, codes=8).train()
    for _ in range(3):
        answer = made(tokens)
        assert answer.value().isfinite().all()
    assert all(tensor.isfinite().all() for tensor in made.state_dict().values())
    assert answer.error < 1e-6


@EVERY
def test_a_dead_code_comes_back_in_training_and_not_when_frozen(name, seeded):
    made, x_ND = quantizer(name).train(), blobs()
    made(x_ND)
    kill(made)
    assert torch.bincount(made(x_ND).code_N, minlength=4).min() == 0
    for _ in range(200):
        made(x_ND)
    assert torch.bincount(made.nearest(x_ND), minlength=4).min() > 0
    made.load_state_dict(made.state_dict() | {"share_C": torch.tensor([0.3, 0.3, 0.0, 0.4])})
    made(x_ND)
    assert made.share_C[2] > 0.2  # as any other, or it would be dead again in the next step
    kill(made)
    made.freeze()
    before = state(made)
    for _ in range(200):
        made(x_ND)
    assert_same(state(made), before)


@EVERY
def test_a_frozen_quantizer_moves_no_code_but_experts_learn_what_codes_mean_whether_loaded_or_not(name, seeded):
    made = layer(name)
    train(made, 3)
    made.freeze_assignment()
    loaded = layer(name)
    loaded.load_state_dict(made.state_dict())
    for one in (made, loaded):
        before = state(one)
        train(one, 3)
        assert_same(*({key: value for key, value in whole.items() if decides(key)} for whole in (state(one), before)))
        embedding = "quantizer.embedding.weight" if name == "fsq" else "code_embedding_CD"
        assert not any(torch.equal(state(one)[key], before[key]) for key in ("experts.w1_EDH", embedding))


@EVERY
def test_training_goes_on_after_save_and_load_as_if_nothing_had_happened(name, seeded, tmp_path):
    made = layer(name, dead_share=0.9)
    train(made, 30)
    save_file(made.state_dict(), tmp_path / "layer.safetensors")
    loaded = layer(name, dead_share=0.9)
    loaded.load_state_dict(load_file(tmp_path / "layer.safetensors"))
    assert_same(state(loaded), state(made))
    x_ND = torch.randn(100, 8)
    assert torch.equal(loaded.quantizer.nearest(x_ND), made.quantizer.nearest(x_ND))
    states = []
    for one in (made, loaded):
        torch.manual_seed(1)
        train(one, 30)
        states.append(state(one))
    assert_same(*states)


@EVERY
def test_repair_brings_dead_codes_back_and_leaves_the_living_ones(name, seeded):
    made, x_ND = quantizer(name), blobs()
    made.repair(x_ND)
    assert made.started
    codes = made.nearest(x_ND)
    assert len(codes.unique()) == 4
    kill(made)
    dead = state(made)
    made.repair(x_ND)
    assert torch.equal(made.nearest(x_ND), codes)
    if hasattr(made, "codebook_CD"):
        assert torch.equal(made.codebook_CD[[0, 1, 3]], dead["codebook_CD"][[0, 1, 3]])
    repaired = state(made)
    made.repair(x_ND)
    assert_same(state(made), repaired)


@EVERY
def test_the_same_seed_gives_the_same_bits(name):
    states = []
    for _ in range(2):
        torch.manual_seed(0)
        made = layer(name, dead_share=0.9)
        train(made, 30)
        states.append(state(made))
    assert_same(*states)


@EVERY
def test_what_decides_the_assignment(name, seeded):
    made = layer(name)
    train(made, 1)
    named = {id(parameter): key for key, parameter in made.named_parameters()}
    keys = {named[id(parameter)] for parameter in made.assignment_parameters()}
    assert keys == {key for key in named.values() if key.startswith(("quantizer", "code_embedding"))}
    assert any(key.startswith("quantizer") for key in keys) is (name not in ("ema", "cosine"))
    assert ("code_embedding_CD" in keys) is (name != "fsq")


def test_an_unknown_quantizer_and_a_grid_of_one_code():
    with pytest.raises(ValueError, match="'nearest', 'task', 'ema', 'cosine', 'low_dim'"):
        SETTINGS["vqmoe"](**(VQ | {"quantizer": "nearst"}))
    with pytest.raises(ValueError, match="codes is 1: at least 2"):
        SETTINGS["vqmoe"](**(VQ | {"quantizer": "fsq", "codes": 1})).check(1)
