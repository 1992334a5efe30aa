"""Compare the methods of the grid: one table, printed and as Markdown, and plots, with the data of each as CSV."""

import csv
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from pipeline.errors import Failure
from pipeline.evaluation import plots
from pipeline.evaluation.tables import Table, comparison
from pipeline.files import output_file, output_folder, write_rows
from stages.paths import GRID_STAGES, Cell, Paths, read_result


def run(params: SimpleNamespace, paths: Paths) -> dict:
    """Writes report.md, data/ (CSV) and figures/; prints the table. Returns no metrics of its own."""
    methods, seeds = params.grid.methods, params.grid.seeds
    references = read_result(paths.result("prepare"))["metrics"]["references"]
    cells = {
        method: {
            stage: [read_result(paths.result(stage, Cell(method, seed)))["metrics"] for seed in seeds] for stage in GRID_STAGES
        }
        for method in methods
    }
    training = _rows(paths, "pretrain", "history.csv", methods, seeds)
    severity = _rows(paths, "robustness", "scores.csv", methods, seeds)
    table = comparison(cells, references)
    with output_folder(paths.report / "data") as folder:
        write_rows(folder / "training.csv", training)
        write_rows(folder / "severity.csv", severity)
    figures = _figures(params, paths, training, severity, references["bits_per_character"])
    with output_folder(paths.report / "figures") as folder:
        for name, figure in figures.items():
            plots.save(figure, folder / f"{name}.png", params.report.dpi)
    with output_file(paths.report / "report.md") as file:
        file.write_text(_text(params, table, _modes(severity), list(figures)), encoding="utf-8")
    table.show()
    print(f"Report: {paths.report / 'report.md'}\nCompare the runs in the browser: vqmoe ui")
    return {}


def _figures(
    params: SimpleNamespace,
    paths: Paths,
    training: list[dict[str, Any]],
    severity: list[dict[str, Any]],
    references: dict[str, float],
) -> dict[str, Any]:
    methods, seeds = params.grid.methods, params.grid.seeds

    def by_seed(rows: list[dict[str, Any]], method: str, **wanted: str) -> list[list[dict[str, float]]]:
        return [
            [
                row
                for row in rows
                if (row["method"], row["seed"]) == (method, seed) and all(row[k] == v for k, v in wanted.items())
            ]
            for seed in seeds
        ]

    unit = next(unit for unit in plots.UNITS if f"valid/{unit}" in training[0])
    compressors = {f"{name} (test)": references[name] for name in ("gzip", "bz2", "xz")} if unit == "bpc" else {}
    figures = {"training": plots.training_curves({m: by_seed(training, m) for m in methods}, unit, compressors)}
    kinds = [kind for kind in dict.fromkeys(row["kind"] for row in severity) if kind not in ("clean", "shift")]
    changed = "characters" if unit == "bpc" else "tokens"
    titles = {
        "warmed-up": (changed, "bits per token", "Language model under noise, in the mode of inference"),
        "classifier": ("characters", "accuracy", "Classifier under noise"),
    }
    for model, texts in titles.items():
        curves = {
            kind: {
                method: [
                    clean + noisy
                    for clean, noisy in zip(
                        by_seed(severity, method, model=model, kind="clean"),
                        by_seed(severity, method, model=model, kind=kind),
                        strict=True,
                    )
                ]
                for method in methods
            }
            for kind in kinds
        }
        figures[f"robustness-{model}"] = plots.severity_curves(curves, *texts)
    confusion, labels = _confusion(paths, methods, seeds[0])
    figures["confusion"] = plots.confusion_maps(confusion, labels, f"Classifier on test, seed {seeds[0]}")
    load = _rows(paths, "robustness", "load.csv", methods, seeds[:1])
    for what in ("expert", "code"):
        if shares := _shares(load, what):
            figures[f"{what}-load"] = plots.share_maps(shares, what)
    return figures


def _shares(load: list[dict[str, Any]], what: str) -> dict[str, np.ndarray]:
    """Share of tokens (layers, experts or codes) for each method and mode, of the first seed; none where there is no choice."""
    found: dict[str, dict[int, list[float]]] = {}
    for row in load:
        if row["what"] == what:
            panel = found.setdefault(f"{row['method']}, {row['model']}, mode {row['mode']}", {})
            panel.setdefault(int(row["layer"]), []).append(row["share"])
    shares = {name: np.array([panel[layer] for layer in sorted(panel)]) for name, panel in found.items()}
    return {name: share for name, share in shares.items() if share.shape[1] > 1}


def _rows(paths: Paths, stage: str, file: str, methods: tuple[str, ...], seeds: tuple[int, ...]) -> list[dict[str, Any]]:
    """The rows of every cell's CSV, with method and seed; numbers as numbers."""
    rows = []
    for method in methods:
        for seed in seeds:
            heads, *lines = _lines(paths.output(stage, Cell(method, seed)) / file)
            rows += [{"method": method, "seed": seed} | dict(zip(heads, map(_number, line), strict=True)) for line in lines]
    return rows


def _confusion(paths: Paths, methods: tuple[str, ...], seed: int) -> tuple[dict[str, np.ndarray], list[str]]:
    """Examples per true (rows) and predicted label for each method, and the labels."""
    tables = {method: _lines(paths.output("finetune", Cell(method, seed)) / "confusion.csv") for method in methods}
    counts = {method: np.array([line[1:] for line in lines], dtype=int) for method, (_, *lines) in tables.items()}
    return counts, tables[methods[0]][0][1:]


def _lines(path: Path) -> list[list[str]]:
    try:
        with open(path, newline="", encoding="utf-8") as handle:
            return list(csv.reader(handle))
    except FileNotFoundError:
        raise Failure(f"{path}: not found; run `dvc repro`") from None


def _number(text: str) -> str | float:
    try:
        return float(text)
    except ValueError:
        return text


def _modes(severity: list[dict[str, Any]]) -> str:
    """The mode of each method in pre-training and, if it is another, after it."""
    modes: dict[str, dict[str, None]] = {}
    for row in severity:
        modes.setdefault(row["method"], {})[row["mode"]] = None
    return ", ".join(f"{method} {' then '.join(found)}" for method, found in modes.items())


def _text(params: SimpleNamespace, table: Table, modes: str, figures: list[str]) -> str:
    seeds = ", ".join(map(str, params.grid.seeds))
    caution = (
        "One seed: no interval can be given, and small differences say nothing."
        if len(params.grid.seeds) == 1
        else "Mean +/- standard deviation over seeds."
    )
    unknown = " and also spell what is <unk> to a model" if params.data.tokenizer == "words" else ""
    lines = [
        "# Report",
        "",
        f"Corpus {params.data.corpus}, view {params.data.view}, task {params.data.task}, seeds {seeds}. {caution}",
        "",
        table.markdown(),
        "",
        "Bits per character or perplexity: lower is better; compressors see the test split only"
        f"{unknown}. Modes of pre-training and after it: {modes}. Lost to noise: mean over all corruptions and severities, "
        "positive when noise hurts; experts unchanged: share of a classifier's assignments that noise leaves as they were (fewer "
        "experts per token or an uneven load raise it by chance). A classifier reads the first model.context tokens of a "
        "passage, TF-IDF all of it. Data of the plots: data/.",
        "",
        *(f"![{name}](figures/{name}.png)" for name in figures),
        "",
    ]
    return "\n".join(lines)
