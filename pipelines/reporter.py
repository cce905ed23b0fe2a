"""What a verb says while it works: lines, progress bars and tables on a terminal, silence for machines."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from compress.progress import Progress as ProgressCallback
from compress.stopping import Stop


class Reporter:
    """Lines and bars on standard error, results on standard output.

    Args:
        quiet: Say nothing (``--json``): the caller prints the result as JSON.
        stop: Asked whenever a bar moves: a layer or a step is finished then.
    """

    def __init__(self, *, quiet: bool = False, stop: Stop | None = None) -> None:
        self.quiet = quiet
        self._stop = Stop() if stop is None else stop
        # NO_COLOR means plain to us: rich would still write bold and italics.
        plain: dict[str, Any] = {"color_system": None} if os.environ.get("NO_COLOR") else {}
        self.console = Console(stderr=True, quiet=quiet, highlight=False, **plain)
        self.out = Console(quiet=quiet, highlight=False, **plain)

    def say(self, text: str) -> None:
        """One line about what happens."""
        self.console.print(escape(text))

    @contextlib.contextmanager
    def bar(self, label: str) -> Iterator[ProgressCallback]:
        """A progress bar with the time left; when this is no terminal, one line with the seconds at the end.

        Its callback raises `compress.stopping.Stopped` when that was asked.
        """
        if not self.console.is_terminal:
            started = time.monotonic()
            yield lambda done, total, text: self._stop.check()
            self.say(f"  {label}: {time.monotonic() - started:.1f} s")
            return
        columns = (
            TextColumn("  {task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[text]}"),
        )
        with Progress(*columns, console=self.console) as progress:
            task = progress.add_task(label, total=None, text="")

            def update(done: int, total: int, text: str) -> None:
                progress.update(task, completed=done, total=total, text=escape(text))
                self._stop.check()

            yield update

    def table(
        self,
        title: str,
        header: Sequence[str],
        rows: Sequence[Sequence[str]],
        *,
        left: Sequence[str] = (),
    ) -> None:
        """A result table; the first column and those named in ``left`` are left-aligned, the others right-aligned."""
        table = Table(show_edge=False, pad_edge=False)
        for i, name in enumerate(header):
            table.add_column(
                escape(name), justify="left" if i == 0 or name in left else "right", overflow="fold"
            )
        for row in rows:
            table.add_row(*(escape(cell) for cell in row))
        self.out.print()
        self.out.print(escape(title), style="italic")
        self.out.print(table)

    def facts(self, title: str, rows: Sequence[Sequence[str]]) -> None:
        """Facts without a header: all columns left-aligned, the first never broken."""
        table = Table(show_edge=False, pad_edge=False, show_header=False, box=None)
        for i in range(max(map(len, rows), default=0)):
            table.add_column(no_wrap=i == 0, overflow="fold")
        for row in rows:
            table.add_row(*(escape(cell) for cell in row))
        self.out.print()
        self.out.print(escape(title), style="italic")
        self.out.print(table)


def human_bytes(count: float) -> str:
    """Bytes in decimal units: ``269.1 MB``."""
    value, units = float(count), ("B", "kB", "MB", "GB", "TB")
    for unit in units:
        if value < 1000 or unit == units[-1]:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    raise AssertionError("unreachable")


def human_count(count: float) -> str:
    """Counts in decimal units: ``134.5 M``."""
    value = float(count)
    for unit in ("", " k", " M", " B"):
        if value < 1000 or unit == " B":
            return f"{value:.0f}" if unit == "" else f"{value:.1f}{unit}"
        value /= 1000
    raise AssertionError("unreachable")
