"""Progress of a long step: a live bar on a terminal, a plain line every few seconds anywhere else, nothing with VQMOE_QUIET."""

import os
import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

SECONDS_BETWEEN_LINES = 5.0


class Progress:
    """`with Progress("pretrain vqmoe-s0", total=1800, unit="step") as progress: progress.advance(loss=2.1)`.

    Of these, `done` are done before. Values given to `advance` are shown beside the rate (units per second) and the time left.
    """

    def __init__(self, label: str, total: float, unit: str = "step", done: float = 0.0) -> None:
        self.label, self.total, self.unit = label, total, unit
        self.done = self._before = done
        self.values: dict[str, float] = {}
        self._console = Console(stderr=True, quiet=bool(os.environ.get("VQMOE_QUIET")))
        self._bar: Bar | None = None

    def __enter__(self) -> "Progress":
        self._start = self._last_line = time.monotonic()
        if self._console.is_terminal:
            self._bar = Bar(
                TextColumn("{task.description}"),
                BarColumn(bar_width=30),
                TextColumn("{task.percentage:>3.0f}%"),
                TextColumn("{task.fields[text]}"),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._task = self._bar.add_task(self.label, total=self.total, text="")
            self._bar.start()
        return self

    def advance(self, units: float = 1, **values: float) -> None:
        """Count `units` more as done and remember the latest `values`."""
        self.done += units
        self.values |= values
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, text=self._text())
        elif time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES:
            self._line()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif error is None:
            self._line()

    def _rate(self) -> float:
        return (self.done - self._before) / max(time.monotonic() - self._start, 1e-9)

    def _text(self) -> str:
        return "  ".join([f"{self._rate():.1f} {self.unit}/s", *(f"{k} {v:.4g}" for k, v in self.values.items())])

    def _line(self) -> None:
        self._last_line = time.monotonic()
        left = max(self.total - self.done, 0) / max(self._rate(), 1e-9)
        if not self._console.quiet:
            line = f"{self.label}: {self.done:.0f}/{self.total:.0f} {self._text()}  {left:.0f} s left"
            print(line, file=sys.stderr, flush=True)
