"""Stages that are cut off go on, and end with the bits of those that were not."""

import os
import shutil

import pytest

from pipeline import config
from pipeline.errors import Failure
from pipeline.files import digest
from pipeline.moe.layer import SETTINGS
from pipeline.training.states import States
from stages import finetune, pretrain, warmup
from stages.execute import execute
from stages.paths import SECTIONS, Cell, Paths
from stages.resume import resumable
from tests.conftest import REPOSITORY

MODULES = {"pretrain": pretrain, "warmup": warmup, "finetune": finetune}


class Cut(States):
    """Ends the process, as far as a test can, after so many states."""

    left = 0

    def of(self, name):
        return Cut(self.folder / name, self.steps, self.seconds)

    def save(self, step, state):
        super().save(step, state)
        Cut.left -= 1
        if not Cut.left:
            raise KeyboardInterrupt


@pytest.fixture
def prepared(tiny_overrides, tmp_path):
    params = config.load(REPOSITORY / "params.yaml", SETTINGS, (*tiny_overrides, "finetune.scratch=true"))
    paths = Paths(tmp_path / "repository", tmp_path / "repository")
    paths.root.mkdir()
    execute("prepare", params, paths)
    return params, paths


def run(stage, params, paths, cell, states):
    logged = []
    chosen = params.select(SECTIONS[stage], cell.method)
    metrics = MODULES[stage].run(chosen, paths, cell, lambda values, step: logged.extend((key, step) for key in values), states)
    return metrics, logged, digest(paths.output(stage, cell))


@pytest.mark.parametrize(
    ("method", "more"),
    [
        ("vqmoe", {}),
        ("vqmoe_released", {"methods.vqmoe_released.codes": 4}),
        ("smoe_dropout", {}),
        ("competesmoe", {"methods.competesmoe.compete": 0.5}),
        ("stablemoe", {}),
        ("smoe", {"model.positions": "relative", "model.memory": 32, "model.evaluate_memory": 32, "model.dropout": 0.1}),
    ],
)
def test_cut_off_after_any_step_it_ends_as_if_it_had_not_been(prepared, tiny_overrides, method, more, tmp_path):
    overrides = (*tiny_overrides, "finetune.scratch=true", *(f"{key}={value}" for key, value in more.items()))
    params, paths = config.load(REPOSITORY / "params.yaml", SETTINGS, overrides), prepared[1]
    for stage in MODULES:
        cell = Cell(method, 0, None if stage == "pretrain" else "toy")
        whole = run(stage, params, paths, cell, None)
        shutil.rmtree(paths.output(stage, cell))
        states, cuts = Cut(tmp_path / "states" / stage, 1, 60), 0
        # Every step once: 12 of pre-training, 4 of others, 8 of fine-tuning with and without pre-training.
        while True:
            Cut.left = 1
            try:
                metrics, last, bits = run(stage, params, paths, cell, states)
            except KeyboardInterrupt:
                cuts += 1
                continue
            break
        assert cuts == {"pretrain": 12, "warmup": 4, "finetune": 8}[stage]
        assert metrics == whole[0] and bits == whole[2]
        assert last == []


def test_each_step_is_logged_once(prepared, tmp_path):
    params, paths = prepared
    cell, logged = Cell("vqmoe", 0), []
    chosen = params.select(SECTIONS["pretrain"], "vqmoe")
    for left in (5, 3, 2, 100):
        Cut.left = left
        try:
            pretrain.run(
                chosen, paths, cell, lambda values, step: logged.extend((key, step) for key in values), Cut(tmp_path / "s", 1, 60)
            )
        except KeyboardInterrupt:
            pass
    assert sorted(logged) == sorted(run("pretrain", params, paths, cell, None)[1])


def test_the_folder_hangs_on_all_that_the_result_does_and_goes_when_it_is_there(prepared):
    params, paths = prepared
    cell, inputs = Cell("vqmoe", 0), [paths.source]

    def place(params, inputs=inputs, cell=cell):
        with resumable("pretrain", params.select(SECTIONS["pretrain"], "vqmoe"), params.resume, paths, cell, inputs) as states:
            assert states.folder.parent == paths.root / ".resume"
        assert not states.folder.exists()
        return states.folder.name

    first = place(params)
    assert place(params) == first
    assert place(params.model_copy(update={"grid": None, "report": None})) == first
    other = params.model_copy(update={"pretrain": params.pretrain.model_copy(update={"clip": 2.0})})
    (paths.source / "more").write_text("x")
    assert len({first, place(other), place(params), place(params, cell=Cell("vqmoe", 1))}) == 4


def test_a_failed_stage_keeps_its_states_and_a_second_process_is_told(prepared, monkeypatch):
    params, paths = prepared
    chosen, cell = params.select(SECTIONS["pretrain"], "vqmoe"), Cell("vqmoe", 0)
    given = ("pretrain", chosen, params.resume, paths, cell, [paths.source])
    with pytest.raises(RuntimeError), resumable(*given) as states:
        states.save(1, {"step": 1})
        raise RuntimeError
    monkeypatch.setattr("stages.resume.WAIT_SECONDS", 0.1)
    with resumable(*given) as states:
        assert states.newest() == {"step": 1}
        with (
            pytest.raises(Failure, match=r"another process runs pretrain-vqmoe-s0 with the same params; wait"),
            resumable(*given),
        ):
            pass
    assert not os.listdir(paths.root / ".resume")
