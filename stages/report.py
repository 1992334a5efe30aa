"""Compare the methods of the grid: claims, tables and figures, as one page, as Markdown and as CSV."""

import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from pipeline.errors import Failure
from pipeline.evaluation import findings, forms, plots, summary, tables
from pipeline.evaluation.claims import Claim
from pipeline.evaluation.exhibits import exhibits
from pipeline.evaluation.grid import IMAGES, LANGUAGE, Grid, Row, units_of
from pipeline.evaluation.html import Shown, page
from pipeline.evaluation.pictures import Pictures
from pipeline.files import output_file, output_folder, write_rows
from stages.paths import Cell, Paths, of_images, read_result

# Columns of the CSV files that hold text; all others are numbers or empty.
TEXT = {"model", "mode", "family", "kind", "what"}

# What a language model is scored in, by its tokenizer.
UNITS = {"bytes": "bpc", "characters": "bpc", "words": "perplexity", "bpe": "perplexity"}


def run(params: SimpleNamespace, paths: Paths) -> dict:
    """Writes index.html, report.md, data/ (CSV) and figures/; prints as `show` does. Returns no metrics of its own."""
    grid = read(params, paths)
    claims, timed, measures, pairs = show(grid)
    timings = summary.timings(grid)
    main = tables.comparison("Methods compared", grid.methods, measures)
    numbers = {
        "claims": [claim._asdict() for claim in (*claims, *timed)],
        "methods": tables.measure_rows(measures),
        "compute": tables.measure_rows(timings),
        "pairs": tables.pair_rows(pairs),
        "gains": findings.gains(grid),
    }
    shown = []
    with output_folder(paths.report / "data") as data, output_folder(paths.report / "figures") as figures:
        for exhibit in exhibits(grid):
            plots.save(exhibit.figure, figures / f"{exhibit.name}.png", params.report.dpi)
            write_rows(data / f"{exhibit.name}.csv", exhibit.rows)
            shown.append(Shown.of(exhibit, figures, data))
        for name, rows in numbers.items():
            write_rows(data / f"{name}.csv", rows)
        csvs = {name: (data / f"{name}.csv").read_bytes() for name in numbers}
    with output_file(paths.report / "report.md") as file:
        # Without timings: the same params give the same file.
        file.write_text(_text(params, grid, tables.claim_table(claims), main, pairs, shown), encoding="utf-8")
    whole = {
        "claims": tables.claim_table([*claims, *timed]),
        "methods": main,
        "compute": tables.comparison("Compute", grid.methods, timings),
        "pairs": tables.pair_table("All pairs of methods", pairs, len(grid.seeds)),
    }
    with output_file(paths.report / "index.html") as file:
        file.write_text(page(params.data, grid, whole, csvs, shown), encoding="utf-8")
    print(f"Report: {paths.report / 'index.html'}\nCompare the runs in the browser: vqmoe ui")
    return {}


def show(grid: Grid) -> tuple[list[Claim], list[Claim], list[summary.Measure], list[findings.Pair]]:
    """Print claims, main table and the first method's pairs; returns what they are made of, claims about timings apart."""
    claims, timed = findings.claims(grid), findings.timed_claims(grid)
    measures, pairs = summary.measures(grid), findings.pairs(grid)
    if claims:
        tables.claim_table([*claims, *timed]).show()
    tables.comparison("Methods compared", grid.methods, measures).show()
    if pairs:
        _first_pairs(grid, pairs).show()
    return claims, timed, measures, pairs


def _first_pairs(grid: Grid, pairs: Sequence[findings.Pair]) -> tables.Table:
    first = grid.methods[0]
    with_it = [pair for pair in pairs if first in (pair.first, pair.second)]
    return tables.pair_table(f"Pairs with {first}", with_it, len(grid.seeds))


def read(params: SimpleNamespace, paths: Paths) -> Grid:
    """All that the stages wrote of a grid. Raises Failure for the first file that is missing, damaged, of another form or not
    finite.
    """
    methods, seeds, tasks = params.grid.methods, params.grid.seeds, tuple(params.data.tasks)
    stages = [("pretrain", None), *((stage, task) for stage in ("warmup", "finetune") for task in tasks), ("robustness", None)]
    read_results = {
        (stage, task): {m: [read_result(paths.result(stage, Cell(m, seed, task))) for seed in seeds] for m in methods}
        for stage, task in stages
    }
    compute = {method: read_result(paths.result("compute", Cell(method, 0))) for method in methods}

    def each(results: Any, key: str) -> Any:
        return {stage: {m: [one[key] for one in found] for m, found in by.items()} for stage, by in results.items()}

    runs = each(read_results, "run_id")

    def rows(stage: str, file: str, form: Mapping[str, Any]) -> list[dict[str, Any]]:
        return [
            {"method": method, "seed": seed, "run_id": run} | row
            for method in methods
            for seed, run in zip(seeds, runs[stage, None][method], strict=True)
            for row in _numbers(paths.output(stage, Cell(method, seed)) / file, form)
        ]

    base = IMAGES if of_images(params.data.view) else LANGUAGE
    unit = "accuracy" if base == IMAGES else UNITS[params.data.tokenizer]
    all_rows = {
        "history": rows("pretrain", "history.csv", forms.history(unit)),
        "routing": rows("pretrain", "routing.csv", forms.ROUTING),
        "scores": rows("robustness", "scores.csv", forms.SCORES),
        "layers": rows("robustness", "layers.csv", forms.LAYERS),
        "load": rows("robustness", "load.csv", forms.LOAD),
        "confusion": [
            {"method": method, "seed": seeds[0], "run_id": runs["finetune", task][method][0], "task": task} | row
            for task in tasks
            for method in methods
            for row in _confusion(paths.output("finetune", Cell(method, seeds[0], task)) / "confusion.csv")
        ],
    }

    def units(method: str, seed: int) -> dict[str, np.ndarray]:
        scores = [row for row in all_rows["scores"] if (row["method"], row["seed"]) == (method, seed)]
        return _units(paths, Cell(method, seed), base, tasks, scores)

    grid = Grid(
        base=base,
        unit=unit,
        methods=methods,
        seeds=seeds,
        tasks=tasks,
        prepared=read_result(paths.result("prepare"))["metrics"],
        results=each(read_results, "metrics"),
        runs=runs,
        compute={method: found["metrics"] for method, found in compute.items()},
        compute_runs={method: found["run_id"] for method, found in compute.items()},
        tables=all_rows,
        units={method: [units(method, seed) for seed in seeds] for method in methods},
        pictures={m: Pictures.load(paths.output("robustness", Cell(m, seeds[0]))) for m in methods if base == IMAGES},
        resamples=params.report.resamples,
    )
    grid.check()
    _check_metrics(grid, paths)
    return grid


def _check_metrics(grid: Grid, paths: Paths) -> None:
    def check(path: Path, metrics: Mapping[str, Any], form: Any) -> None:
        forms.check(path, {"metrics": metrics}, {"metrics": form})

    check(paths.result("prepare"), grid.prepared, forms.prepared(grid.base, grid.unit, grid.tasks))
    for (stage, task), by_method in grid.results.items():
        for method, found in by_method.items():
            for seed, metrics in zip(grid.seeds, found, strict=True):
                check(paths.result(stage, Cell(method, seed, task)), metrics, forms.result(stage, grid.unit))
    for method, metrics in grid.compute.items():
        check(paths.result("compute", Cell(method, 0)), metrics, forms.compute(grid.modes(method)))


def _numbers(path: Path, form: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of a CSV with the columns of a form, numbers as numbers and None where a field is empty."""
    heads, *lines = _lines(path)
    rows = [{head: _number(path, head, text) for head, text in zip(heads, line, strict=True)} for line in lines]
    forms.check(path, {head: [row[head] for row in rows] for head in heads}, form)
    return rows


def _number(path: Path, head: str, text: str) -> str | float | None:
    if head in TEXT:
        return text
    try:
        value = float(text) if text else None
    except ValueError:
        value = math.nan
    if value is not None and not math.isfinite(value):
        raise Failure(f"{path}: {head} is {text!r}, expected a finite number; run the stage again with a lower learning rate")
    return value


def _confusion(path: Path) -> list[dict[str, Any]]:
    """A row per true and predicted label."""
    (_, *labels), *lines = _lines(path)
    if [true for true, *_ in lines] != labels:
        raise Failure(f"{path}: damaged, its rows and columns are not the same labels; run `dvc repro`")
    counts = {true: [_number(path, true, text) for text in row] for true, *row in lines}
    forms.check(path, counts, dict.fromkeys(labels, forms.Values))
    return [
        {"true": true, "predicted": label, "examples": int(count)}
        for true, row in counts.items()
        for label, count in zip(labels, row, strict=True)
    ]


def _lines(path: Path) -> list[list[str]]:
    try:
        with open(path, newline="", encoding="utf-8") as handle:
            lines = list(csv.reader(handle))
    except FileNotFoundError:
        raise Failure(f"{path}: not found; run `dvc repro`") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise Failure(f"{path}: cannot be read ({error}); run `dvc repro`") from None
    if len({len(line) for line in lines}) != 1 or not lines[0]:
        raise Failure(f"{path}: damaged, its lines are not all as long; run `dvc repro`")
    return lines


def _units(paths: Paths, cell: Cell, base: str, tasks: Sequence[str], scores: Sequence[Row]) -> dict[str, np.ndarray]:
    """What robustness kept of each text of its `scores`, and what each text of the whole test split got before."""
    file = "units.safetensors"
    modes = dict.fromkeys(row["mode"] for row in scores if row["model"] == base)
    pretrained = _arrays(paths.output("pretrain", cell) / file, modes)
    units, wanted = {}, forms.units(base, scores)
    if "groups" in pretrained:
        units[f"{base}/test/groups"] = pretrained.pop("groups")
        own = dict.fromkeys(units_of(base, row["family"], row["kind"]) for row in scores if row["model"] == base)
        wanted += [f"{name}/groups" for name in own]
    units |= {f"{base}/{mode}/test": score_U for mode, score_U in pretrained.items()}
    for task in tasks:
        arrays = _arrays(paths.output("finetune", cell._replace(task=task)) / file, ["correct"])
        if "groups" in arrays:
            wanted += [f"{task}/groups", f"{task}/attack/groups"]
        units[f"{task}/test"] = arrays.pop("correct")
        units |= {f"{task}/test/{name}": numbers_U for name, numbers_U in arrays.items()}
    return units | _arrays(paths.output("robustness", cell) / file, wanted)


def _arrays(path: Path, wanted: Iterable[str]) -> dict[str, np.ndarray]:
    try:
        arrays = load_file(path)
    except FileNotFoundError:
        raise Failure(f"{path}: not found; run `dvc repro`") from None
    except (OSError, SafetensorError, AttributeError, TypeError) as error:  # the last two for a type that numpy lacks
        raise Failure(f"{path}: cannot be read ({error}); run `dvc repro`") from None
    forms.check(path, arrays, dict.fromkeys(wanted, Any))
    return arrays


def _text(
    params: SimpleNamespace,
    grid: Grid,
    claims: tables.Table,
    main: tables.Table,
    pairs: Sequence[findings.Pair],
    shown: Sequence[Shown],
) -> str:
    few = findings.too_few(len(grid.seeds))
    modes = ", ".join(f"{method} {' then '.join(dict.fromkeys(grid.modes(method)))}" for method in grid.methods)
    if grid.base == IMAGES:
        scores = (
            "A token is a patch. Severities of noise are levels, 1 to 5; an attack's is by how many 255ths it may move a pixel."
        )
        reads = "The linear classifier reads pixels."
    else:
        unknown = " and also spell what is <unk> to a model" if params.data.tokenizer == "words" else ""
        scores = f"Bits per character or perplexity: lower is better; compressors see the test split only{unknown}."
        reads = "A classifier reads the first model.context tokens of a passage, TF-IDF all of it."
    lines = [
        "# Report",
        "",
        f"Corpus {params.data.corpus}, view {params.data.view}, tasks {', '.join(grid.tasks)}, seeds "
        f"{', '.join(map(str, grid.seeds))}. index.html has all of it, with what the measures mean and with timings, which "
        "differ from run to run and are left out here.",
        "",
        claims.markdown() if claims.rows else f"No claims: they are about {findings.CLAIMANT}, which the grid does not have.",
        "",
        main.markdown(),
        "",
        f"{f'{few}: intervals say nothing about another training run. ' if few else ''}"
        "Means over seeds with 95 % bootstrap intervals in brackets or +/- standard deviation"
        f"{'' if grid.base == IMAGES else '; test texts of one document are drawn together'}. "
        f"{scores} Modes of pre-training and after it: {modes}. Lost to noise: mean over all kinds and severities, positive when "
        "noise hurts; experts unchanged: share of assignments that noise leaves as they were (fewer experts per token or an "
        f"uneven load raise it by chance). {reads} Data: data/.",
        "",
        _first_pairs(grid, pairs).markdown() if pairs else "One method: no pairs to compare.",
        "",
        *(f"![{one.title}](figures/{one.name}.png)" for one in shown),
        "",
    ]
    return "\n".join(lines)
