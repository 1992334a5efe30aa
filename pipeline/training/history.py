"""A training curve as a CSV file."""

import csv
from pathlib import Path


def write_history(path: Path, rows: list[dict[str, float]]) -> None:
    """One line per validation; a value that a row lacks stays empty."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)
