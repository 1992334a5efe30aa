"""Where models compute. Tests of a GPU run where there is one."""

import numpy as np
import pytest
import torch

from pipeline.config import Machine
from pipeline.errors import Failure
from pipeline.evaluation.attack import greedy
from pipeline.evaluation.image_attack import pgd
from pipeline.models.build import build
from pipeline.models.flops import flops_per_token
from pipeline.moe.dispatch import apply_experts
from pipeline.moe.experts import Experts
from pipeline.moe.layer import SETTINGS
from pipeline.training.loop import fit
from pipeline.training.machine import at_work
from pipeline.training.objectives import LanguageObjective
from pipeline.training.optim import adam
from pipeline.training.seeding import seed_everything
from pipeline.training.states import States
from pipeline.training.validation import RoutingTally, held_out, score_tokens

METHODS = [method for method in SETTINGS if method not in ("softmoe", "vmoe")]
TOKENS = (np.arange(4000) * 7 % 26).astype(np.uint8)
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_one_line():
    with (
        pytest.raises(Failure, match=r"machine\.device is cuda: torch finds no GPU here; set it to cpu"),
        at_work(_machine("cuda")),
    ):
        pass


def test_on_a_cpu_bfloat16_is_refused():
    with pytest.raises(ValueError, match=r"needs machine\.device cuda"):
        _machine("cpu", "bf16")


def _machine(device, precision="fp32"):
    return Machine(device=device, precision=precision, processes=1)


def _train(tiny_params, tiny_spec, method, machine, steps=12, overrides=(), states=None):
    """Losses of some steps, the model, and its scores in each mode."""
    params = tiny_params("model.dropout=0.0", f"pretrain.steps={steps}", "pretrain.batch=8", *overrides)
    seed_everything(0, "test")
    model = build(tiny_spec(method, model=params.model, settings=params.method(method))).to(machine.device)
    objective, losses = LanguageObjective(model, TOKENS, batch=8, seed=0, mode=model.train_mode, unit="bpc", steps=steps), []

    def watched(step):
        loss, parts = objective(step)
        losses.append(loss.detach())
        return loss, parts

    with at_work(machine):
        fit(
            model,
            adam(model, 1e-2),
            params.pretrain.model_copy(update={"steps": steps, "validate_every": steps}),
            objective=objective if states else watched,
            validate=lambda: {"bpc": score_tokens(model, held_out(model, TOKENS, 500), model.train_mode, "bpc")},
            score="bpc",
            log=lambda values, step: None,
            label="test",
            states=states,
        )
        tally = RoutingTally(model)
        rows = held_out(model, TOKENS, 500)
        scores = [score_tokens(model, rows, mode, "bpc", watch=tally) for mode in model.modes]
    return [loss.item() for loss in losses], model, scores, tally.expert_shares()


@gpu
@pytest.mark.parametrize("method", METHODS)
def test_a_gpu_trains_as_the_cpu_does_and_repeats_its_bits(tiny_params, tiny_spec, method):
    """Assignments that are nearly ties may go the other way: the losses of the first steps are close, not equal."""
    on_cpu = _train(tiny_params, tiny_spec, method, _machine("cpu"))
    on_gpu, again = (_train(tiny_params, tiny_spec, method, _machine("cuda")) for _ in range(2))
    assert on_gpu[0] == again[0] and on_gpu[2] == again[2]
    for name, tensor in on_gpu[1].state_dict().items():
        assert torch.equal(tensor, again[1].state_dict()[name]), name
    np.testing.assert_allclose(on_gpu[0][:4], on_cpu[0][:4], rtol=2e-3)
    np.testing.assert_allclose(on_gpu[2], on_cpu[2], rtol=0.1)


@gpu
@pytest.mark.parametrize("method", METHODS)
def test_bfloat16_is_close_to_float32(tiny_params, tiny_spec, method):
    exact, fast = (_train(tiny_params, tiny_spec, method, _machine("cuda", kind)) for kind in ("fp32", "bf16"))
    assert exact[0] != fast[0]
    np.testing.assert_allclose(fast[0][:3], exact[0][:3], rtol=2e-2)
    assert all(parameter.dtype == torch.float32 for parameter in fast[1].parameters())


@gpu
@pytest.mark.parametrize("memory", [False, True])
def test_on_a_gpu_a_training_goes_on_to_the_bit(tiny_params, tiny_spec, tmp_path, memory):
    long = ("model.positions=relative", "model.memory=16", "model.evaluate_memory=16") if memory else ()
    whole = _train(tiny_params, tiny_spec, "vqmoe", _machine("cuda"), 8, long, States(tmp_path / "a", 1, 1e9))
    cut = States(tmp_path / "b", 1, 1e9)
    _train(tiny_params, tiny_spec, "vqmoe", _machine("cuda"), 8, long, cut)
    newest = max((tmp_path / "b").glob("*.safetensors"))
    newest.unlink()  # as if the last step had never been
    resumed = _train(tiny_params, tiny_spec, "vqmoe", _machine("cuda"), 8, long, States(tmp_path / "b", 1, 1e9))
    for name, tensor in whole[1].state_dict().items():
        assert torch.equal(tensor, resumed[1].state_dict()[name]), name


@gpu
@pytest.mark.parametrize("weighted", [False, True])
def test_experts_answer_alike_on_both(weighted):
    torch.manual_seed(0)
    experts, index_NK = Experts(5, 16, 32), torch.randint(-1, 5, (70, 2))
    torch.nn.init.normal_(experts.b1_EH)
    torch.nn.init.normal_(experts.b2_ED)
    x_ND, weight_NK = torch.randn(70, 16), torch.rand(70, 2)
    results = []
    for device in ("cpu", "cuda"):
        there = experts.to(device)
        there.zero_grad()
        given_ND = x_ND.to(device).clone().requires_grad_()
        y = apply_experts(there, given_ND, index_NK.to(device), weight_NK.to(device) if weighted else None)
        y.square().sum().backward()
        gradients = (parameter.grad for parameter in there.parameters())
        # Copies: what the CPU's experts have moves to the GPU with them.
        results.append([one.cpu().clone() for one in (y.detach(), given_ND.grad, *gradients)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-3)


@gpu
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("memory", [0, 16])
def test_a_gpu_costs_the_flops_of_the_cpu(tiny_params, tiny_spec, method, memory):
    overrides = ("model.memory=16", "model.evaluate_memory=16", "model.positions=relative") if memory else ()
    params = tiny_params(*overrides)
    model = build(tiny_spec(method, model=params.model, settings=params.method(method)))
    counts = [
        [flops_per_token(model.to(device), mode, 16, memory, targets=range(8)) for mode in model.modes]
        for device in ("cpu", "cuda")
    ]
    # There the answers' weighted sum is a product of matrices too.
    np.testing.assert_allclose(counts[1], counts[0], rtol=0.02)
    assert counts[1] >= counts[0]


@gpu
def test_attacks_run_where_the_model_is(tiny_params, tiny_spec):
    params = tiny_params()
    model = build(tiny_spec("vqmoe", model=params.model, settings=params.method("vqmoe"))).cuda().eval()
    tokens_ST = torch.randint(26, (3, 20), device="cuda")

    def loss(tokens_BT, rows_B):
        return model.nats(model(tokens_BT, "both").state_BTD, tokens_ST[rows_B]).mean(1)

    edits = greedy(
        loss,
        model.embedding,
        tokens_ST,
        torch.ones_like(tokens_ST, dtype=torch.bool),
        torch.arange(26, device="cuda"),
        torch.full((3,), 2, device="cuda"),
        8,
    )
    assert (edits.cpu().position_SK >= 0).any()
    pixels_BCHW = torch.rand(2, 1, 8, 8, device="cuda")
    moved = pgd(lambda pixels: (pixels * pixels_BCHW).sum((1, 2, 3)), pixels_BCHW, 0.1, 0, range(2), steps=2)
    assert moved.device.type == "cuda" and not torch.equal(moved, pixels_BCHW)
