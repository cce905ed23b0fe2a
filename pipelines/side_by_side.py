"""Texts of several models on a terminal: in columns where they fit, else one below the other; live while they grow."""

from __future__ import annotations

import contextlib
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from compress.pipelines.reporter import Reporter

LEAST = 36
"""Cells a column must have; with less for each, texts go one below the other."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """What stands under one heading: a text and a line about it."""

    text: str
    note: str = ""


class SideBySide:
    """Shows texts under their headings.

    On a terminal a text is shown while it grows. What is not a terminal gets every text once, when it is whole: at once
    where they go one below the other, at the end where they share lines.

    Args:
        reporter: Where to; a quiet one gets nothing.
        titles: The headings, one a text.
    """

    def __init__(self, reporter: Reporter, titles: Sequence[str]) -> None:
        self._reporter = reporter
        self._console = reporter.out
        self._titles = list(titles)
        self._columns = [Column(text="", note="") for _ in titles]
        self.wide = self._console.width // max(len(self._titles), 1) >= LEAST and len(self._titles) > 1

    @contextlib.contextmanager
    def writing(self, place: int) -> Iterator[Callable[[str], None]]:
        """While the text at ``place`` is made: gives what is to be called with all of it so far."""
        if self._reporter.quiet or not self._console.is_terminal:
            yield lambda text: None
            return
        self._columns[place] = Column(text="", note="loading ...")
        with Live(self._growing(place), console=self._console, transient=True, refresh_per_second=10) as live:

            def show(text: str) -> None:
                self._columns[place] = Column(text=text, note="...")
                live.update(self._growing(place))

            yield show

    def finish(self, place: int, column: Column) -> None:
        """The text at ``place`` is whole."""
        self._columns[place] = column
        if not self.wide:
            self._console.print(self._block(place))

    def end(self) -> None:
        """Every text is whole."""
        if self.wide:
            self._console.print(self._table(self._columns))

    def _growing(self, place: int) -> RenderableType:
        return self._table(self._columns) if self.wide else self._block(place)

    def _block(self, place: int) -> RenderableType:
        column = self._columns[place]
        return Group(
            Text(self._titles[place], style="bold"),
            Text(printable(column.text)),
            Text(column.note, style="dim"),
            Text(),
        )

    def _table(self, columns: Sequence[Column]) -> Table:
        table = Table(show_edge=False, pad_edge=False, show_footer=True, expand=True)
        for title, column in zip(self._titles, columns, strict=True):
            table.add_column(
                Text(title), footer=Text(column.note, style="dim"), overflow="fold", ratio=1, vertical="top"
            )
        table.add_row(*(Text(printable(column.text)) for column in columns))
        return table


def printable(text: str) -> str:
    """A text without characters that would steer the terminal: what a model writes is not to be trusted."""
    return "".join("\ufffd" if unicodedata.category(c) == "Cc" and c not in "\n\t" else c for c in text)
