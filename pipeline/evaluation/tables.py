"""Tables of results: plain rows first, then as text on the terminal and as Markdown."""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from pipeline.errors import printable
from pipeline.evaluation.claims import Claim
from pipeline.evaluation.findings import Pair, too_few
from pipeline.evaluation.statistics import Estimate
from pipeline.evaluation.summary import Measure, Spread

_NUMBER = r"-?[\d.]+"
_INTERVAL = rf"\[{_NUMBER}, {_NUMBER}\]"
_NUMERIC = re.compile(rf"({_NUMBER}( \+/- {_NUMBER}| {_INTERVAL})?( \(.*\)| %| points)?|{_INTERVAL})?")


class Table(NamedTuple):
    """A title, column heads and rows of ready-made text."""

    title: str
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        lines = [f"### {self.title}", "", _line(self.heads)]
        lines.append("|" + "|".join("---:" if self.numeric(column) else "---" for column in range(len(self.heads))) + "|")
        return "\n".join([*lines, *map(_line, self.rows)])

    def numeric(self, column: int) -> bool:
        return any(row[column] for row in self.rows) and all(_NUMERIC.fullmatch(row[column]) for row in self.rows)

    def show(self) -> None:
        """Print with every cell whole: on a terminal in as many parts as its width takes, each with the first column."""
        console = Console()
        cells = [[head, *(printable(row[column]) for row in self.rows)] for column, head in enumerate(self.heads)]
        numeric = [self.numeric(column) for column in range(len(self.heads))]
        # What is said of a number in parentheses goes below it.
        cells = [[cell.replace(" (", "\n(") if n else cell for cell in own] for own, n in zip(cells, numeric, strict=True)]
        # With its two spaces and a border.
        widths = [3 + max(cell_len(line) for cell in own for line in cell.split("\n")) for own in cells]
        if not console.is_terminal:
            console = Console(width=1 + sum(widths))
        # On a terminal words give way, but not too far; numbers stay whole.
        least = [width if n else min(width, 27) for width, n in zip(widths, numeric, strict=True)]
        parts: list[list[int]] = []
        for column in range(1, len(cells)):
            if not parts or 1 + least[0] + sum(least[one] for one in (*parts[-1], column)) > console.width:
                parts.append([])
            parts[-1].append(column)
        for place, part in enumerate(parts):
            table = RichTable(title=None if place else Text(self.title, "italic"), title_justify="left")
            for column in (0, *part):
                right, fits = "right" if numeric[column] else "left", 1 + least[0] + least[column] <= console.width
                table.add_column(Text(cells[column][0]), justify=right, no_wrap=numeric[column] and fits, overflow="fold")
            for row in range(1, len(cells[0])):
                # As Text: rich would take [words] in brackets for markup.
                table.add_row(*(Text(cells[column][row]) for column in (0, *part)))
            console.print(table)


def value_text(value: Estimate | Spread | None, digits: int, scale: float = 1.0) -> str:
    """`mean [low, high]` or `mean +/- deviation`, nothing where there is no value; no minus before a zero."""

    def number(one: float) -> str:
        return f"{scale * one:z.{digits}f}"

    if value is None:
        return ""
    if isinstance(value, Estimate):
        return f"{number(value.value)} [{number(value.low)}, {number(value.high)}]"
    return number(value.value) + ("" if value.deviation is None else f" +/- {number(value.deviation)}")


def comparison(title: str, methods: Sequence[str], measures: Sequence[Measure]) -> Table:
    """One row per measure and one column per method; the last column has notes, such as what to compare a score with."""
    rows = []
    for measure in measures:
        cells = []
        for method in methods:
            text = value_text(measure.values.get(method), measure.digits, measure.scale)
            cells.append(f"{text} ({measure.labels[method]})" if text and method in measure.labels else text)
        rows.append((measure.name, *cells, measure.note))
    return Table(title, ("measure", *methods, "note"), rows)


def claim_table(claims: Sequence[Claim]) -> Table:
    rows = [(one.claim, one.verdict, one.measured, one.interval, one.note) for one in claims]
    return Table("Claims of the paper", ("claim", "verdict", "measured", "95 % interval", "note"), rows)


def pair_table(title: str, pairs: Sequence[Pair], seeds: int) -> Table:
    """The first method's value less the second's, and of what is lost the first's robustness gain over the second."""

    def gained(one: Estimate | None) -> str:
        return f"{100 * one.value:z.1f} [{100 * one.low:z.1f}, {100 * one.high:z.1f}]" if one else ""

    rows = [
        (
            pair.measure,
            f"{pair.first} - {pair.second}",
            f"{pair.scale * pair.estimate.value:z.{pair.digits}f}",
            f"[{pair.scale * pair.estimate.low:z.{pair.digits}f}, {pair.scale * pair.estimate.high:z.{pair.digits}f}]",
            f"{pair.estimate.p:.3f}",
            f"{pair.p_holm:.3f}",
            gained(pair.gain),
            too_few(seeds),
        )
        for pair in pairs
    ]
    return Table(title, ("measure", "methods", "difference", "95 % interval", "p", "p (Holm)", "gain %", "note"), rows)


def measure_rows(measures: Sequence[Measure]) -> list[dict[str, Any]]:
    """The numbers of `comparison`, unrounded, a row per measure and method. A row named "- ..." is part of the one above."""
    rows, above = [], ""
    for measure in measures:
        above = above if measure.name.startswith("- ") else measure.name
        name = measure.name if above == measure.name else f"{above} {measure.name}"
        for method, value in measure.values.items():
            if value is not None:
                ends = value._asdict()
                row = {"measure": name, "method": method, "value": ends["value"]}
                row |= {key: ends.get(key) for key in ("low", "high", "deviation")}
                rows.append({key: one * measure.scale if isinstance(one, float) else one for key, one in row.items()})
    return rows


def pair_rows(pairs: Sequence[Pair]) -> list[dict[str, Any]]:
    """The numbers of `pair_table`, unrounded."""
    return [
        {"measure": pair.measure, "first": pair.first, "second": pair.second}
        | {key: pair.scale * getattr(pair.estimate, key) for key in ("value", "low", "high")}
        | {"p": pair.estimate.p, "p_holm": pair.p_holm}
        | dict(zip(("gain", "gain_low", "gain_high"), pair.gain or (None,) * 3, strict=False))
        for pair in pairs
    ]


def _line(cells: Sequence[str]) -> str:
    # A bar or the end of a line in a user's name would end the cell.
    return "| " + " | ".join(printable(cell).replace("|", r"\|") for cell in cells) + " |"
