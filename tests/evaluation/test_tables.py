import io

import pytest
from rich.console import Console

from pipeline.evaluation import tables
from pipeline.evaluation.claims import Claim
from pipeline.evaluation.findings import Pair
from pipeline.evaluation.statistics import Estimate
from pipeline.evaluation.summary import Measure, Spread
from pipeline.evaluation.tables import Table, claim_table, comparison, measure_rows, pair_rows, pair_table, value_text

MEASURES = [
    Measure("lost", {"vqmoe": Estimate(0.1, 0.05, 0.2), "smoe": None}, 1, 100, "mode", {"vqmoe": "swap 10 %"}),
    Measure("- after", {"smoe": Spread(0.5, 0.25)}, 2),
]
PAIR = Pair("lost", "vqmoe", "smoe", Estimate(-0.125, -0.25, -0.0001, 0.0123), 0.0369, 1, 100, Estimate(0.3, 0.1, 0.5))


def test_a_value_shows_its_interval_or_its_spread():
    assert value_text(Spread(1.5, None), 2) == "1.50"
    assert value_text(Spread(0.6, 0.1414), 1, 100) == "60.0 +/- 14.1"
    assert value_text(Estimate(0.7094, 0.7, 0.72), 3) == "0.709 [0.700, 0.720]"
    assert value_text(Estimate(-0.0001, -0.01, 0.01), 2) == "0.00 [-0.01, 0.01]"
    assert value_text(None, 1) == ""


def test_a_row_per_measure_a_column_per_method_and_blanks_where_a_measure_does_not_apply():
    table = comparison("Methods compared", ("vqmoe", "smoe"), MEASURES)
    assert table.heads == ("measure", "vqmoe", "smoe", "note")
    assert table.rows == [("lost", "10.0 [5.0, 20.0] (swap 10 %)", "", "mode"), ("- after", "", "0.50 +/- 0.25", "")]
    assert [table.numeric(column) for column in range(4)] == [False, True, True, False]
    assert table.markdown().splitlines()[2:4] == ["| measure | vqmoe | smoe | note |", "|---|---:|---:|---|"]


def test_the_numbers_behind_a_table_are_unrounded_and_parts_name_their_whole():
    assert measure_rows(MEASURES) == [
        {"measure": "lost", "method": "vqmoe", "value": 10.0, "low": 5.0, "high": 20.0, "deviation": None},
        {"measure": "lost - after", "method": "smoe", "value": 0.5, "low": None, "high": None, "deviation": 0.25},
    ]
    (row,) = pair_rows([PAIR])
    assert row == {"measure": "lost", "first": "vqmoe", "second": "smoe", "value": -12.5, "low": -25.0, "high": -0.01} | {
        "p": 0.0123,
        "p_holm": 0.0369,
        "gain": 0.3,
        "gain_low": 0.1,
        "gain_high": 0.5,
    }
    (row,) = pair_rows([PAIR._replace(gain=None)])
    assert row["gain"] is row["gain_low"] is row["gain_high"] is None


def test_a_cell_is_one_line_whatever_a_name_has_in_it(capsys):
    table = Table("Labels", ("labels", "value"), [("b\n\nc\x1b[1m | d", "1")])
    assert table.markdown().splitlines()[-1] == r"| b\n\nc\x1b[1m \| d | 1 |"
    table.show()
    assert r"b\n\nc\x1b[1m | d" in capsys.readouterr().out


def test_claims_and_pairs_are_ready_text():
    claim = Claim("28 % more robust", "50.1 %", "[48.8, 51.3]", "supported", "")
    table = claim_table([claim])
    assert table.heads == ("claim", "verdict", "measured", "95 % interval", "note")
    assert table.rows == [("28 % more robust", "supported", "50.1 %", "[48.8, 51.3]", "")]
    assert [table.numeric(column) for column in range(5)] == [False, False, True, True, False]
    assert pair_table("Pairs", [PAIR], 2).rows == [
        ("lost", "vqmoe - smoe", "-12.5", "[-25.0, 0.0]", "0.012", "0.037", "30.0 [10.0, 50.0]", "2 seeds: fewer than 3")
    ]


def shown(monkeypatch, table, terminal=None):
    """What is printed on a terminal of that width, or into a file."""
    out = io.StringIO()

    def console(width=terminal):
        return Console(file=out, width=width, force_terminal=bool(terminal), color_system=None)

    monkeypatch.setattr(tables, "Console", console)
    table.show()
    return out.getvalue()


def wide():
    methods = [f"method_{i}" for i in range(9)]
    values = {m: Estimate(i + 0.705, i + 0.521, i + 0.876) for i, m in enumerate(methods)}
    labels = dict.fromkeys(methods, "whitespace 20 %")
    long = "language model: a measure whose name has more words than a narrow terminal has places"
    return comparison("All", methods, [Measure(long, values, 3, labels=labels), Measure("short", values, 3, note="a note")])


@pytest.mark.parametrize("width, parts", [(80, 5), (120, 3)])
def test_a_narrow_terminal_gets_a_table_in_parts_with_every_cell_whole(monkeypatch, width, parts):
    text = shown(monkeypatch, wide(), width)
    assert max(map(len, text.splitlines())) <= width
    assert text.count("\u2503 measure") == text.count("\u2502 short") == parts
    for i in range(9):
        assert f"method_{i} " in text and text.count(f"{i}.705 [{i}.521, {i}.876] ") == 2
    assert text.count("(whitespace 20 %)") == 9 and "a note" in text and "\u2026" not in text


def test_a_column_wider_than_the_terminal_is_folded(monkeypatch):
    text = shown(monkeypatch, Table("", ("measure", "x" * 50), [("y" * 70, "1.0")]), 40)
    assert text.count("x") == 50 and text.count("y") == 70 and max(map(len, text.splitlines())) <= 40


def test_what_is_no_terminal_gets_one_table_without_a_wrapped_cell(monkeypatch):
    table = wide()
    text = shown(monkeypatch, table)
    assert text.count("\u2503 measure") == 1 and table.rows[0][0] in text and "a note" in text


def test_text_of_a_user_stays_what_it_is(monkeypatch):
    table = Table("a [red]title", ("a | b", "[bold]x"), [("[link]y", "z")])
    text = shown(monkeypatch, table)
    assert "a [red]title" in text and "[link]y" in text and "[bold]x" in text
    assert table.markdown().splitlines()[2] == r"| a \| b | [bold]x |"
