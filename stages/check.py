"""What was found out about data of one's own, for a terminal."""

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

import click

from pipeline.checking import Findings, as_yaml, check, known, together
from pipeline.checking.findings import percent
from pipeline.data.tables import SPLITS
from pipeline.errors import Failure, printable

SHOWN, FILES = 12, 5  # classes, and files that are not UTF-8
WIDTH, NAME = 110, 14  # characters of a line, and of a class that has room beside its sizes


def run(paths: Sequence[Path], root: Path, as_json: bool) -> None:
    """Print what is found and the params to paste, of several paths those of one experiment with all of them.

    Raises UsageError, before anything is read, for a path that is none, and Failure, at the end, if `prepare` would refuse one.
    """
    paths = list({os.path.abspath(path): path for path in paths}.values())
    for path in paths:
        known(path)
    every = [check(path, root) for path in paths]
    whole = every[0] if len(every) == 1 else together(every)
    if as_json:
        more = {} if len(every) == 1 else {"data": [found.as_json() for found in every]}
        click.echo(json.dumps(whole.as_json() | more, indent=2))
    elif len(every) == 1:
        show(whole)
    else:
        for place, found in enumerate(every):
            click.echo("\n" * (place > 0) + printable(found.path))
            show(found, params=False)
        if whole.warnings:
            click.echo()
        show(whole)
    if len(every) > 1:
        for found in every:
            if found.problem:
                click.echo(f"vqmoe: {found.problem}", err=True)
    if whole.problem:
        raise Failure(whole.problem)


def show(found: Findings, params: bool = True) -> None:
    for name, value in _lines(found.facts):
        click.echo(f"{name:<16}{printable(value)}")
    for warning in found.warnings:
        said = printable(warning)
        click.echo(fill(said, WIDTH, initial_indent="! ", subsequent_indent="  ", break_on_hyphens=False, break_long_words=False))
    if params and found.params:
        begin = f"Begin with `vqmoe preset {found.preset} > params.yaml`. " if found.preset else ""
        click.echo(f"\n{begin}Put this into params.yaml, in place of what it has for these keys:\n\n{as_yaml(found)}", nl=False)


def _lines(facts: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield from ((name, facts[name]) for name in ("form",) if name in facts)
    if left := facts.get("left out"):
        yield "left out", _each({suffix or "without a suffix": count for suffix, count in left.items()})
    if given := facts.get("encoding"):
        yield "encoding", _encoding(given)
    if "splits" in facts or "classes" in facts:
        yield "", "".join(f"{split:>12}" for split in SPLITS)
    if splits := facts.get("splits"):
        for unit in splits["train"]:
            yield unit, _row(splits, unit)
    if classes := facts.get("classes"):
        yield from _classes(classes)
    if lengths := facts.get("lengths"):
        for unit in ("characters", "bytes"):
            yield ("lengths" if unit == "characters" else ""), f"{unit} of {lengths['of']}: {_each(lengths[unit])}"
    if sizes := facts.get("sizes"):
        yield "sizes", f"{sizes['different']:,} different; width {_each(sizes['width'])}"
        yield "", f"height {_each(sizes['height'])}"
        yield "modes", _each(facts["modes"])
        yield "unreadable", f"{len(facts['unreadable']):,}"
    if repeated := facts.get("duplicates"):
        yield "duplicates", "; ".join(f"{place} {count:,}" for place, count in repeated.items())
    if "empty" in facts:
        yield "empty", f"{facts['empty']:,}"
    if view := facts.get("view"):
        such = f" ({view['such as']})" if view["such as"] else ""
        yield (
            "view",
            f"text27 loses {percent(view['characters lost by text27'])} of the characters, "
            f"{percent(view['letters lost by text27'])} of the letters{such}",
        )
    if control := facts.get("control characters"):
        yield "control", _each(control)


def _encoding(given: dict[str, Any]) -> str:
    if not given["undecodable"]:
        marks = given["byte-order marks"]
        return "UTF-8" + (f", a byte-order mark in {len(marks):,} files, which is left out" if marks else "")
    files = []
    for file in given["undecodable"][:FILES]:
        places = ", ".join(f"{place['byte']:,} ({place['value']})" for place in file["first"])
        files.append(f"{file['file']}, byte {places}{'' if file['bytes'] == len(file['first']) else ', ...'}")
    return f"not UTF-8: {'; '.join(files)}"


def _classes(classes: dict[str, dict[str, int]]) -> Iterator[tuple[str, str]]:
    largest = sorted(classes, key=lambda name: -classes[name]["train"])
    some = largest if len(largest) <= SHOWN else [*largest[: SHOWN - 2], *largest[-1:]]
    yield "classes", f"{len(classes):,}, the largest first"
    for place, name in enumerate(some):
        if len(some) < len(largest) and place == len(some) - 1:
            yield "  ...", ""
        sizes = "".join(f"{classes[name][split]:>12,}" for split in SPLITS)
        shown = printable(name)
        if len(shown) > NAME:
            yield fill(shown, WIDTH, initial_indent="  ", subsequent_indent="    "), ""
            yield "", sizes
        else:
            yield f"  {shown}", sizes


def _row(splits: dict[str, dict[str, int]], unit: str) -> str:
    return "".join(f"{splits[split][unit]:>12,}" for split in SPLITS)


def _each(values: dict[str, int]) -> str:
    return ", ".join(f"{name} {value:,}" for name, value in values.items())
