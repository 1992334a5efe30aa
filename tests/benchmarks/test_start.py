import json
import subprocess
import sys

from benchmarks import start


def test_commands_run_where_the_tiny_experiment_has_run(tmp_path, monkeypatch, capsys):
    origin = tmp_path / "origin"
    (origin / "presets").mkdir(parents=True)
    (origin / "presets/tiny.yaml").write_text("".join(start.SMALL))
    for command in (["init", "-q"], ["add", "."], ["-c", "user.name=a", "-c", "user.email=a@b.c", "commit", "-qm", "all"]):
        subprocess.run(["git", *command], cwd=origin, check=True)
    commands = {"stage": ["sh", "-c", "cat params.yaml >> staged"], start.REPRO: ["sh", "-c", "cat params.yaml >> whole"]}
    monkeypatch.setattr(start, "ROOT", origin)
    monkeypatch.setattr(start, "COMMANDS", commands)
    works = start.works(tmp_path / "place")
    for work in (works["stage"], works[start.REPRO]):
        work()
    small = "".join(start.SMALL.values())
    # Once to make the experiment, which the stage's copy has too, and once as a command.
    assert (tmp_path / "place/whole/whole").read_text() == small * 2
    assert (tmp_path / "place/copy/whole").read_text() == small
    assert (tmp_path / "place/copy/staged").read_text() == small
    assert (tmp_path / "place/copy/small/test.txt").exists()


def test_it_writes_what_it_prints(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(start, "works", lambda folder: {"first": lambda: None, "second": lambda: sum(range(10**6))})
    monkeypatch.setattr(sys, "argv", ["start", "--repeats", "6", "--out", str(tmp_path / "start.json")])
    start.main()
    found = json.loads((tmp_path / "start.json").read_text())
    _, *lines = capsys.readouterr().out.splitlines()
    for line, (name, row) in zip(lines, found.items(), strict=True):
        assert line.startswith(name) and f"{row['median']:.2f} [{row['low']:.2f}, {row['high']:.2f}]" in line
    assert found["second"]["median"] > found["first"]["median"]
