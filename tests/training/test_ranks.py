"""Two processes that share training steps, over gloo, against one."""

import os
from datetime import timedelta

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn

from pipeline import config, ranks
from pipeline.config import Machine
from pipeline.errors import UsageError
from pipeline.models.build import Spec, build
from pipeline.moe.layer import SETTINGS
from pipeline.moe.losses import importance_loss
from pipeline.moe.quantizers import QUANTIZERS
from pipeline.training import loop
from pipeline.training.machine import together
from pipeline.training.objectives import LanguageObjective
from pipeline.training.optim import adam
from pipeline.training.seeding import seed_everything
from pipeline.training.states import States
from pipeline.training.validation import held_out, score_tokens
from tests.conftest import REPOSITORY, TINY

PROCESSES, STEPS = 2, 12
TOKENS = np.random.default_rng(0).integers(0, 26, 4000).astype(np.uint8)
# A code that nobody uses is dead within these steps.
DYING = ("methods.vqmoe.dead_share=0.95", "methods.vqmoe.codes=8")
MEMORY = ("model.positions=relative", "model.memory=16", "model.evaluate_memory=16")
ALIKE = {method: (method, ()) for method in SETTINGS if method not in ("softmoe", "vmoe", "vqmoe", "competesmoe")}
GATE = "methods.vqmoe.combine=gate"
ALIKE |= {quantizer: ("vqmoe", (f"methods.vqmoe.quantizer={quantizer}", GATE, *DYING)) for quantizer in QUANTIZERS}
ALIKE |= {
    "distances": ("vqmoe", DYING),
    "without-routed": ("vqmoe", ("methods.vqmoe.drop_routed=0.5",)),
    "competesmoe": ("competesmoe", ("methods.competesmoe.compete=0.5",)),
    "memory": ("smoe", MEMORY),
}


class Cut(States):
    """As if the process had been stopped after this step."""

    last = 5

    def save(self, step, state):
        super().save(step, state)
        if step == self.last:
            raise KeyboardInterrupt


def train(name, method, overrides, states=None):
    """Mean loss of every step and the model's state at the end."""
    params = config.load(
        REPOSITORY / "params.yaml", SETTINGS, (*TINY, "model.dropout=0.0", "pretrain.learning_rate=1e-3", *overrides), method
    )
    seed_everything(0, "test")
    model = build(Spec(kind="language-model", method=method, settings=params.method(method), model=params.model, vocabulary=27))
    losses = []
    try:
        loop.fit(
            model,
            adam(model, 1e-3),
            params.pretrain.model_copy(update={"steps": STEPS, "validate_every": STEPS}),
            objective=LanguageObjective(model, TOKENS, batch=4, seed=0, mode=model.train_mode, unit="bpc", steps=STEPS),
            validate=lambda: {"bpc": score_tokens(model, held_out(model, TOKENS, 500), model.train_mode, "bpc")},
            score="bpc",
            log=lambda values, step: losses.extend(values.get(key) for key in ("train/loss",) if key in values),
            label=name,
            states=states,
        )
    except KeyboardInterrupt:
        pass
    return {"losses": torch.tensor(losses, dtype=torch.float64)} | model.state_dict()


def _all(rank, folder):
    """What two processes do, in one start of them, since a start takes seconds."""
    os.environ.pop("RANK", None)
    torch.set_num_threads(1)
    loop.LOG_EVERY = 1
    meet = {"init_method": f"file://{folder}/meet", "rank": rank, "world_size": PROCESSES, "timeout": timedelta(minutes=2)}
    dist.init_process_group("gloo", **meet)
    with ranks.training():
        found = _found(rank)
    # What the first does alone, such as a test, waits for nobody.
    found["alone"] = ranks.mean(torch.tensor(float(rank))) if rank == 0 else torch.tensor(0.0)
    for name, (method, overrides) in ALIKE.items():
        found |= {f"{name}/{key}": value for key, value in train(name, method, overrides).items()}
    train("cut", "smoe", MEMORY, Cut(folder / "states", 1, 1e9))
    resumed = train("cut", "smoe", MEMORY, States(folder / "again", 1, 1e9))
    found |= {f"resumed/{key}": value for key, value in resumed.items()}
    dist.destroy_process_group()
    save_file({key: value.contiguous().clone() for key, value in found.items()}, folder / f"{rank}.safetensors")


def _found(rank):
    found = {"part": torch.arange(8)[ranks.part(8)]}
    found["gathered"] = ranks.gathered(torch.full((rank + 1, 2), float(rank)))
    found["few"] = ranks.gathered(torch.arange(5) + 10 * rank, limit=4)
    found["agreed"], found["mean"] = ranks.agreed(torch.tensor(rank)), ranks.mean(torch.tensor(float(rank)))
    ranks.reseed(7, 1)
    found["drawn"] = torch.rand(3)
    # A loss that is not linear in what is summed over ranks.
    weight = nn.Parameter(torch.arange(12.0).view(3, 4))
    importance_loss(probs_NE=(_tokens()[ranks.part(6)] @ weight).softmax(1)).backward()
    return found | {"gradient": ranks.mean(weight.grad)}


def _tokens():
    return torch.arange(18.0).view(6, 3).sin()


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """What each of two processes found, and the folder in which they left states after five steps."""
    folder = tmp_path_factory.mktemp("ranks")
    # A training that one process began: the first five steps.
    train("cut", "smoe", MEMORY, Cut(folder / "again", 1, 1e9))
    torch.multiprocessing.start_processes(_all, (folder,), PROCESSES, start_method="spawn")
    return [load_file(folder / f"{rank}.safetensors") for rank in range(PROCESSES)], folder


@pytest.fixture
def every_loss(monkeypatch):
    monkeypatch.setattr(loop, "LOG_EVERY", 1)


def test_parts_rows_and_draws(both):
    (first, second), _ = both
    assert first["part"].tolist() == [0, 1, 2, 3] and second["part"].tolist() == [4, 5, 6, 7]
    for found in (first, second):
        assert found["gathered"].tolist() == [[0, 0], [1, 1], [1, 1]]
        assert found["few"].tolist() == [0, 1, 10, 11]
        assert (found["agreed"], found["mean"], found["alone"]) == (0, 0.5, 0)
    assert not torch.equal(first["drawn"], second["drawn"])


def test_a_loss_of_sums_over_ranks_has_the_gradient_of_all_tokens(both):
    weight = nn.Parameter(torch.arange(12.0).view(3, 4))
    importance_loss(probs_NE=(_tokens() @ weight).softmax(1)).backward()
    assert weight.grad.abs().max() > 0.01
    for found in both[0]:
        torch.testing.assert_close(found["gradient"], weight.grad)


@pytest.mark.parametrize("name", ALIKE)
def test_two_processes_train_as_one_does_and_keep_the_same_model(both, every_loss, name):
    first, second = ({key: value for key, value in found.items() if key.startswith(f"{name}/")} for found in both[0])
    for key, value in first.items():
        assert torch.equal(value, second[key]), key
    alone = train(name, *ALIKE[name])
    assert len(first[f"{name}/losses"]) == STEPS
    torch.testing.assert_close(first[f"{name}/losses"], alone.pop("losses"), atol=1e-5, rtol=0)
    for key, value in alone.items():
        torch.testing.assert_close(first[f"{name}/{key}"], value, atol=1e-3, rtol=0, msg=key)


def test_a_training_goes_on_with_another_number_of_processes(both, every_loss):
    found, folder = both
    whole = train("whole", "smoe", MEMORY)["losses"]
    one = train("cut", "smoe", MEMORY, States(folder / "states", 1, 1e9))["losses"]
    two = found[0]["resumed/losses"]
    for losses in (one, two):
        torch.testing.assert_close(losses, whole[Cut.last :], atol=1e-5, rtol=0)


def test_more_or_fewer_processes_than_params_say_are_refused(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a")
    monkeypatch.setenv("WORLD_SIZE", "3")
    machine = Machine(device="cpu", precision="fp32", processes=2)
    with pytest.raises(UsageError, match=r"machine\.processes is 2: 3 were started; set it to 3"), together(machine):
        pass


def test_a_process_alone_draws_and_computes_as_without_ranks():
    x_ND = torch.rand(3, 2)
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    ranks.reseed(7, 1)
    assert torch.equal(torch.rand(3), expected)
    for same in (ranks.total, ranks.mean, ranks.agreed, ranks.gathered):
        assert same(x_ND) is x_ND
    assert ranks.part(5) == slice(None)
