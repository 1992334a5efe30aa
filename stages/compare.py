"""What the report measured, in the terminal: measures that are asked for, methods in the order of one, turned, or as data."""

import csv
import difflib
import json
import sys
import textwrap
from collections.abc import Collection, Mapping, Sequence
from fnmatch import fnmatchcase

from pipeline.errors import UsageError
from pipeline.evaluation import summary, tables
from pipeline.evaluation.grid import Grid
from pipeline.evaluation.summary import Measure
from stages.report import show

# Characters of a line of a column's head, where measures are columns.
HEAD = 24


def compare(grid: Grid, wanted: Sequence[str], sort: str | None, by: str, form: str | None) -> None:
    """Print the measures whose names contain one of `wanted`, or match it as a glob, in any case; the claims, the main table and
    the pairs with the first method without.

    `sort` orders methods by a measure, the lowest first; `by` says whether a row is a measure or a method; `form` csv or json is
    a row for each measure and method. Raises UsageError for a name that no measure has.
    """
    if not (wanted or sort or form) and by == "measure":
        show(grid)
        return
    main = summary.measures(grid)
    named = _named([*main, *summary.timings(grid)])
    methods = list(grid.methods)
    if sort:
        value = named[_one(sort, named)].values
        methods.sort(key=lambda method: found.value if (found := value.get(method)) else float("inf"))
    names = dict.fromkeys(name for text in wanted for name in _matching(text, named)) or list(named)[: len(main)]
    chosen = [named[name] for name in names]
    if form:
        _write(grid, methods, chosen, form)
    elif by == "measure":
        tables.comparison("Methods compared", methods, chosen).show()
    else:
        _turned(tables.comparison("Methods compared", methods, chosen)).show()


def _named(measures: Sequence[Measure]) -> dict[str, Measure]:
    """Measures by names that say all: that of one which is part of the one above begins with that one's."""
    named, above = {}, ""
    for measure in measures:
        above = above if measure.name.startswith("- ") else measure.name
        name = measure.name if measure.name == above else f"{above} {measure.name}"
        named[name] = measure._replace(name=name)
    return named


def _matching(text: str, names: Collection[str]) -> list[str]:
    pattern = text.lower() if set(text) & set("*?[") else f"*{text.lower()}*"
    if found := [name for name in names if fnmatchcase(name.lower(), pattern)]:
        return found
    words = {word.strip(",:%()").lower() for name in names for word in name.split()}
    (nearest,) = difflib.get_close_matches(text.lower(), [*names, *sorted(words)], 1, cutoff=0)
    raise UsageError(f"no measure has '{text}' in its name, the nearest is '{nearest}'; `vqmoe compare '*'` shows them all")


def _one(text: str, names: Collection[str]) -> str:
    """The measure of that very name, or the only one that matches."""
    found = [text] if text in names else _matching(text, names)
    if len(found) > 1:
        raise UsageError(f"'{text}' is in the names of {len(found)} measures, name one to sort by: {'; '.join(found)}")
    return found[0]


def _turned(table: tables.Table) -> tables.Table:
    """A row per method and a column per measure, without the notes."""
    names, *columns, _ = zip(*table.rows, strict=True)
    heads = ("method", *(textwrap.fill(name, HEAD, break_on_hyphens=False) for name in names))
    return table._replace(heads=heads, rows=[(method, *cells) for method, cells in zip(table.heads[1:], columns, strict=False)])


def _write(grid: Grid, methods: Sequence[str], measures: Sequence[Measure], form: str) -> None:
    """Print the numbers of the report's CSV files, with the seeds that are behind them and each stage's runs of these."""
    places = [measure.name for measure in measures]
    rows = tables.measure_rows(measures)
    rows.sort(key=lambda row: (places.index(row["measure"]), methods.index(row["method"])))
    runs = {m: {"/".join(filter(None, place)): list(of[m]) for place, of in grid.runs.items()} for m in methods}
    runs = {m: of | {"compute": [grid.compute_runs[m]]} for m, of in runs.items()}
    if form == "json":
        whole = [row | {"seeds": list(grid.seeds), "runs": runs[row["method"]]} for row in rows]
        print(json.dumps(whole, indent=2, allow_nan=False))
        return
    lines = [row | _joined({"seeds": grid.seeds} | runs[row["method"]]) for row in rows]
    writer = csv.DictWriter(sys.stdout, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)


def _joined(lists: Mapping[str, Sequence[object]]) -> dict[str, str]:
    return {key: " ".join(map(str, values)) for key, values in lists.items()}
