"""What was found out about data of one's own, for a terminal."""

import json
from collections.abc import Iterator
from pathlib import Path
from textwrap import fill
from typing import Any

import click

from pipeline.checking import Findings, as_yaml, check
from pipeline.checking.findings import percent
from pipeline.data.tables import SPLITS
from pipeline.errors import Failure

SHOWN, FILES = 12, 5  # classes, and files that are not UTF-8
WIDTH = 110


def run(path: Path, root: Path, as_json: bool) -> None:
    """Print what is found and the params to paste. Raises Failure, at the end, if `prepare` would refuse the data."""
    found = check(path, root)
    if as_json:
        click.echo(json.dumps(found.as_json(), indent=2, ensure_ascii=False))
    else:
        show(found)
    if found.problem:
        raise Failure(found.problem)


def show(found: Findings) -> None:
    for name, value in _lines(found.facts):
        click.echo(f"{name:<16}{value}")
    for warning in found.warnings:
        click.echo(
            fill(warning, WIDTH, initial_indent="! ", subsequent_indent="  ", break_on_hyphens=False, break_long_words=False)
        )
    if found.params:
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
    shown = largest if len(largest) <= SHOWN else [*largest[: SHOWN - 2], *largest[-1:]]
    yield "classes", f"{len(classes):,}, the largest first"
    for place, name in enumerate(shown):
        if len(shown) < len(largest) and place == len(shown) - 1:
            yield "  ...", ""
        yield f"  {name if len(name) <= 13 else name[:10] + '...'}", "".join(f"{classes[name][split]:>12,}" for split in SPLITS)


def _row(splits: dict[str, dict[str, int]], unit: str) -> str:
    return "".join(f"{splits[split][unit]:>12,}" for split in SPLITS)


def _each(values: dict[str, int]) -> str:
    return ", ".join(f"{name} {value:,}" for name, value in values.items())
