"""Tables of results: plain rows first, then as text on the terminal and as Markdown."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table as RichTable


class Table(NamedTuple):
    """A title, column heads and rows of ready-made text; the first column is left-aligned."""

    title: str
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        lines = [f"### {self.title}", "", "| " + " | ".join(self.heads) + " |"]
        lines.append("|" + "|".join(["---"] + ["---:"] * (len(self.heads) - 1)) + "|")
        lines += ["| " + " | ".join(row) + " |" for row in self.rows]
        return "\n".join(lines)

    def show(self) -> None:
        """Print on the terminal; where the output is no terminal, wide enough that nothing is cut."""
        console = Console()
        if not console.is_terminal:
            console = Console(width=160)
        table = RichTable(title=self.title, title_justify="left")
        for number, head in enumerate(self.heads):
            table.add_column(head, justify="right" if number else "left")
        for row in self.rows:
            table.add_row(*row)
        console.print(table)


def mean(values: Iterable[float], digits: int, scale: float = 1.0) -> str:
    """Mean over seeds, with the standard deviation where there are several."""
    array = np.array(list(values), dtype=float) * scale
    if len(array) == 1:
        return f"{array[0]:.{digits}f}"
    return f"{array.mean():.{digits}f} +/- {array.std(ddof=1):.{digits}f}"


def comparison(cells: Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]], references: Mapping[str, Any]) -> Table:
    """One row per method: `cells[method][stage]` lists that stage's metrics, one entry per seed.

    `references` are the scores of compressors and TF-IDF from `prepare`, shown as rows of their own.
    """
    heads = (
        "method",
        "test bpc",
        "bpc discrete",
        "bpc warmed up",
        "era accuracy %",
        "macro-F1 %",
        "no pre-training %",
        "bpc lost to noise",
        "accuracy points lost",
        "consistency %",
        "MFLOPs/token pre-train",
        "fine-tune",
    )
    rows = []
    for method, stages in cells.items():
        tests = [entry["test"] for entry in stages["pretrain"]]
        tuned, robust = stages["finetune"], stages["robustness"]
        rows.append(
            (
                method,
                mean((test["bpc"] for test in tests), 3),
                mean((test["bpc_discrete"] for test in tests), 3) if "bpc_discrete" in tests[0] else "",
                mean((entry["after"]["bpc"] for entry in stages["warmup"]), 3),
                mean((entry["test"]["accuracy"] for entry in tuned), 1, 100),
                mean((entry["test"]["macro_f1"] for entry in tuned), 1, 100),
                mean((entry["scratch"]["accuracy"] for entry in tuned), 1, 100) if "scratch" in tuned[0] else "",
                mean((entry["warmed-up"]["degradation"] for entry in robust), 3),
                mean((entry["classifier"]["degradation"] for entry in robust), 1, 100),
                mean((entry["warmed-up"]["consistency"] for entry in robust), 1, 100),
                mean((entry["flops_per_token"]["pretrain"] for entry in tuned), 2, 1e-6),
                mean((entry["flops_per_token"]["finetune"] for entry in tuned), 2, 1e-6),
            )
        )
    blank = ("",) * (len(heads) - 2)
    rows += [(name, f"{value:.3f}", *blank) for name, value in references["bits_per_character"].items()]
    tfidf = references["tfidf"]
    rows.append(
        (
            "TF-IDF + logistic regression",
            "",
            "",
            "",
            f"{100 * tfidf['accuracy']:.1f}",
            f"{100 * tfidf['macro_f1']:.1f}",
            *blank[4:],
        )
    )
    return Table("Methods compared", heads, rows)


def show_run(results: Mapping[str, Mapping[str, Any]], out: Path) -> None:
    """The main numbers of one method's stages, and where the rest lies."""
    pretrain, tuned, robust = (results[stage]["metrics"] for stage in ("pretrain", "finetune", "robustness"))
    rows = [(f"test bits per character ({name})", f"{value:.3f}") for name, value in pretrain["test"].items()]
    rows += [
        ("test accuracy %", f"{100 * tuned['test']['accuracy']:.1f}"),
        ("bits per character lost to noise", f"{robust['warmed-up']['degradation']:.3f}"),
        ("accuracy points lost to noise", f"{100 * robust['classifier']['degradation']:.1f}"),
        ("routing consistency under noise %", f"{100 * robust['classifier']['consistency']:.1f}"),
    ]
    Table(f"{results['pretrain']['method']}, seed {results['pretrain']['seed']}", ("measure", "value"), rows).show()
    Console(width=160).print(f"Models and results: {out}\nCompare runs: vqmoe ui", highlight=False)
