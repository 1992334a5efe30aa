import os
from pathlib import Path

import pytest
import torch

from pipeline import files
from pipeline.training.states import States

TREE = {
    "step": 3,
    "none": None,
    "loss": [0.1, 1e-300, {"deep": torch.tensor([[1.0, float("nan")]])}],
    "flag": torch.tensor(True),
    "small": torch.arange(6, dtype=torch.int8).view(2, 3).T,
}


def same(one, other):
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(
            one.view(torch.uint8) if one.is_floating_point() else one,
            (other.view(torch.uint8) if other.is_floating_point() else other),
        )
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and one == other


def test_a_state_comes_back_as_it_was(tmp_path):
    States(tmp_path / "deep/er", 1, 60).save(3, TREE)
    assert same(States(tmp_path / "deep/er", 1, 60).newest(), TREE)


def test_the_last_two_are_kept_and_the_newest_is_taken(tmp_path):
    states = States(tmp_path, 1, 60)
    assert states.newest() is None
    for step in (9, 10, 11):
        states.save(step, {"step": step})
    assert states.newest() == {"step": 11}
    assert sorted(int(path.name[:9]) for path in tmp_path.iterdir()) == [10, 11]


@pytest.mark.parametrize("damage", ["cut", "bit", "empty"])
def test_a_damaged_newest_falls_back_to_the_one_before(tmp_path, capsys, damage):
    states = States(tmp_path, 1, 60)
    for step in (1, 2):
        states.save(step, {"step": step, "weights": torch.ones(100)})
    (newest,) = tmp_path.glob("000000002-*")
    content = bytearray(newest.read_bytes())
    if damage == "bit":
        content[-7] ^= 1
    newest.write_bytes({"cut": content[:-9], "bit": content, "empty": b""}[damage])
    assert states.newest()["step"] == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{newest}: damaged" in line
    assert [path.name[:9] for path in tmp_path.iterdir()] == ["000000001"]


def test_a_state_is_due_after_so_many_steps_or_seconds(tmp_path, monkeypatch):
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    states = States(tmp_path, 5, 60)
    assert [states.due(step) for step in (4, 5)] == [False, True]
    states.save(5, {})
    assert not states.due(9)
    now = 60.0
    assert states.due(6)
    again = States(tmp_path, 5, 60)
    again.newest()
    assert [again.due(step) for step in (9, 10)] == [False, True]


def test_where_nothing_can_be_written_one_line_says_so_and_that_is_all(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    states = States(tmp_path / "file/x", 1, 60)
    for step in (1, 2):
        states.save(step, {})
    (line,) = capsys.readouterr().err.splitlines()
    assert "cannot be kept" in line and "file/x" in line


def test_what_a_power_failure_takes_is_never_the_last_good_state(tmp_path, monkeypatch):
    """A disk that forgets whatever nobody waited for: a file its content, a folder the names in it."""
    synced: set[str] = set()
    real_sync, real_replace = os.fsync, os.replace

    def sync(descriptor):
        synced.add(os.readlink(f"/proc/self/fd/{descriptor}"))
        real_sync(descriptor)

    def replace(source, target):
        assert str(source) in synced, "renamed before its content was safe"
        synced.discard(str(Path(target).parent))
        real_replace(source, target)

    monkeypatch.setattr(files.os, "fsync", sync)
    monkeypatch.setattr(files.os, "replace", replace)
    states = States(tmp_path, 1, 60)
    unlink = Path.unlink

    def checked(path, missing_ok=False):
        if path.suffix == ".safetensors":
            assert str(tmp_path) in synced, "an old state was removed before the new one's name was safe"
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", checked)
    for step in range(4):
        states.save(step, {"step": step})
    assert states.newest() == {"step": 3}
