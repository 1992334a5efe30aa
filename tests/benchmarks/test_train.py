import json
import sys

import pytest

from benchmarks import train
from pipeline.errors import UsageError

TINY = ("model.layers=1", "model.context=64", "model.evaluate_context=64", "pretrain.batch=4", "finetune.crop=64")


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["train", *arguments, *(f"-S{override}" for override in TINY)])
    train.main()


def test_it_says_what_a_step_costs_beside_a_dense_one(tmp_path, monkeypatch, capsys):
    run(monkeypatch, "smoe", train.LOOP, "--repeats", "6", "--out", str(tmp_path / "train.json"))
    found, printed = json.loads((tmp_path / "train.json").read_text()), capsys.readouterr().out
    assert found.keys() == {"dense", "smoe", train.LOOP}
    for name, row in found.items():
        (line,) = (line for line in printed.splitlines() if line.startswith(f"{name}  "))
        assert f"{row['median']:.2f} [{row['low']:.2f}, {row['high']:.2f}]" in line
    assert found["dense"]["median"] == 1
    assert found["smoe"]["tokens_per_second"] > found[train.LOOP]["tokens_per_second"]


def test_the_profile_says_where_time_goes(monkeypatch, capsys):
    run(monkeypatch, "--profile", "vqmoe")
    shares = [float(line.split()[0]) for line in capsys.readouterr().out.splitlines()]
    assert shares == sorted(shares, reverse=True) and 30 < sum(shares) <= 100.5


def test_a_method_that_is_none_is_refused(monkeypatch):
    with pytest.raises(UsageError, match="'somoe'"):
        run(monkeypatch, "somoe")
