import pytest
from rich.console import Console

from pipeline import progress
from pipeline.progress import Progress


def test_plain_lines_give_rate_values_and_time_left(capsys, monkeypatch):
    times = iter([0.0, 2.0, 10.0, 10.0, 10.0, 10.0, 20.0, 20.0, 20.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(times))
    with Progress("pretrain x", total=40) as shown:
        shown.advance(10, loss=2.5)  # after 2 s: too early for a line
        shown.advance(10, loss=1.25)  # after 10 s
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["pretrain x: 20/40 2.0 step/s  loss 1.25  10 s left", "pretrain x: 20/40 1.0 step/s  loss 1.25  20 s left"]


def test_a_failed_step_ends_without_a_line(capsys):
    with pytest.raises(ValueError, match="no"), Progress("prepare", total=5):
        raise ValueError("no")
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar(capsys, monkeypatch):
    monkeypatch.setattr(progress, "Console", lambda **more: Console(force_terminal=True, width=120, **more))
    with Progress("pretrain x", total=4) as shown:
        for _ in range(4):
            shown.advance(loss=1.5)
    printed = capsys.readouterr().err
    assert "pretrain x" in printed
    assert "100%" in printed
    assert "loss 1.5" in printed


@pytest.mark.parametrize("terminal", [True, False])
def test_nothing_is_shown_where_quiet_is_asked_for(capsys, monkeypatch, terminal):
    monkeypatch.setenv("VQMOE_QUIET", "1")
    monkeypatch.setattr(progress, "Console", lambda **more: Console(force_terminal=terminal, **more))
    with Progress("pretrain x", total=4) as shown:
        shown.advance(4)
    assert capsys.readouterr() == ("", "")
