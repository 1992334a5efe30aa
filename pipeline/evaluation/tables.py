"""Tables of results: plain rows first, then as text on the terminal and as Markdown."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table as RichTable


class Table(NamedTuple):
    """A title, column heads and rows of ready-made text."""

    title: str
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        lines = [f"### {self.title}", "", "| " + " | ".join(self.heads) + " |"]
        lines.append("|" + "|".join("---:" if self._numeric(column) else "---" for column in range(len(self.heads))) + "|")
        lines += ["| " + " | ".join(row) + " |" for row in self.rows]
        return "\n".join(lines)

    def _numeric(self, column: int) -> bool:
        return all(re.fullmatch(r"(-?[\d.]+( \+/- [\d.]+)?)?", row[column]) for row in self.rows)

    def show(self) -> None:
        """Print on the terminal; where the output is no terminal, wide enough that nothing is cut."""
        console = Console()
        if not console.is_terminal:
            console = Console(width=160)
        table = RichTable(title=self.title, title_justify="left")
        for column, head in enumerate(self.heads):
            # On a narrow terminal numbers stay whole, words give way.
            numeric = self._numeric(column)
            table.add_column(head, justify="right" if numeric else "left", no_wrap=numeric)
        for row in self.rows:
            table.add_row(*row)
        console.print(table)


def mean(values: Iterable[float | None], digits: int, scale: float = 1.0) -> str:
    """Mean over seeds, with the standard deviation where there are several."""
    array = np.array(list(values), dtype=float) * scale
    if len(array) == 1:
        return f"{array[0]:.{digits}f}"
    return f"{array.mean():.{digits}f} +/- {array.std(ddof=1):.{digits}f}"


def comparison(cells: Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]], references: Mapping[str, Any]) -> Table:
    """One row per measure and one column per method: `cells[method][stage]` lists that stage's metrics, one per seed.

    The last column names what a score has to be compared with: compressors and TF-IDF, `references` from `prepare`.
    """
    compressors = ", ".join(f"{name} {value:.3f}" for name, value in references["bits_per_character"].items())
    perplexities = ", ".join(f"{name} {value:.0f}" for name, value in references.get("perplexity", {}).items())
    tfidf = references["tfidf"]
    # Measure, stage, keys into its metrics, digits, scale, what to compare with.
    measures: list[tuple[str, str, tuple[str, ...], int, float, str]] = [
        ("test bits per character", "pretrain", ("test", "bpc"), 3, 1, compressors),
        ("- discrete path alone", "pretrain", ("test", "bpc_discrete"), 3, 1, ""),
        ("- router's top-k experts alone", "pretrain", ("test", "bpc_router"), 3, 1, ""),
        ("test perplexity", "pretrain", ("test", "perplexity"), 2, 1, perplexities),
        ("- discrete path alone", "pretrain", ("test", "perplexity_discrete"), 2, 1, ""),
        ("- router's top-k experts alone", "pretrain", ("test", "perplexity_router"), 2, 1, ""),
        ("valid bits per character of the task, before warm-up", "warmup", ("before", "bpc"), 3, 1, "mode of inference"),
        ("- after warm-up", "warmup", ("after", "bpc"), 3, 1, "mode of inference"),
        ("valid perplexity of the task, before warm-up", "warmup", ("before", "perplexity"), 2, 1, "mode of inference"),
        ("- after warm-up", "warmup", ("after", "perplexity"), 2, 1, "mode of inference"),
        ("codebook utilisation %", "warmup", ("after", "code_utilisation"), 0, 100, ""),
        ("codebook perplexity", "warmup", ("after", "code_perplexity"), 2, 1, ""),
        ("quantization error, before warm-up", "warmup", ("before", "code_error"), 3, 1, "squared, per element"),
        ("- after warm-up", "warmup", ("after", "code_error"), 3, 1, "squared, per element"),
        ("test accuracy %", "finetune", ("test", "accuracy"), 1, 100, f"TF-IDF {100 * tfidf['accuracy']:.1f}"),
        ("test macro-F1 %", "finetune", ("test", "macro_f1"), 1, 100, f"TF-IDF {100 * tfidf['macro_f1']:.1f}"),
        (
            "- accuracy without pre-training %",
            "finetune",
            ("scratch", "accuracy"),
            1,
            100,
            f"majority {100 * tfidf['majority']:.1f}",
        ),
        ("- macro-F1 without pre-training %", "finetune", ("scratch", "macro_f1"), 1, 100, ""),
        ("bits per token lost to noise", "robustness", ("warmed-up", "degradation"), 3, 1, "mode of inference"),
        ("bits per token lost on raw text", "robustness", ("warmed-up", "shift"), 3, 1, "mode of inference"),
        ("accuracy points lost to noise", "robustness", ("classifier", "degradation"), 1, 100, ""),
        ("experts unchanged by noise %", "robustness", ("classifier", "consistency"), 1, 100, ""),
        ("accuracy points lost on raw text", "robustness", ("classifier", "shift"), 1, 100, ""),
        ("parameters, million", "pretrain", ("parameters",), 2, 1e-6, ""),
        ("MFLOPs per token, pre-training", "pretrain", ("flops_per_token",), 2, 1e-6, "forward pass"),
        ("MFLOPs per token, fine-tuning", "finetune", ("flops_per_token",), 2, 1e-6, "forward pass"),
    ]
    rows = []
    for measure, stage, keys, digits, scale, note in measures:
        values = [[_at(entry, keys) for entry in stages[stage]] for stages in cells.values()]
        if any(None not in seeds for seeds in values):
            rows.append((measure, *("" if None in seeds else mean(seeds, digits, scale) for seeds in values), note))
    return Table("Methods compared", ("measure", *cells, "to compare with"), rows)


def _at(metrics: Mapping[str, Any], keys: Sequence[str]) -> float | None:
    value: Any = metrics
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value
