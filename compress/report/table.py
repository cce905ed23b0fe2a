"""Tables and lists of facts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from compress.report.html import Child, Html, h
from compress.report.values import DASH, Record, flatten


def table(
    head: Sequence[str], rows: Iterable[Sequence[Child]], *, caption: Child = None, numeric: bool = True
) -> Html:
    """A table whose first column names the row; the others are right-aligned when ``numeric``.

    With more than five columns it becomes a list of cards on a narrow screen.
    """
    classes = [name for name, on in (("numeric", numeric), ("wide", len(head) > 5)) if on]
    body = [
        h(
            "tr",
            h("th", row[0], scope="row"),
            [h("td", cell, data_label=name) for name, cell in zip(head[1:], row[1:], strict=True)],
        )
        for row in rows
    ]
    return h(
        "div",
        h(
            "table",
            h("caption", caption) if caption is not None else None,
            h("thead", h("tr", [h("th", name, scope="col") for name in head])),
            h("tbody", body),
            class_=" ".join(classes) or None,
        ),
        class_="scroll",
    )


def facts(pairs: Iterable[tuple[str, Child]], *, long: bool = False) -> Html:
    """Name and value pairs, side by side, or one to a line when ``long``."""
    entries = [h("div", h("dt", name), h("dd", value)) for name, value in pairs]
    return h("dl", entries, class_="facts long" if long else "facts")


def record_facts(record: Record) -> Html:
    """A record of any shape as name and value pairs."""
    pairs = list(flatten(record)) if record else [("nothing recorded", DASH)]
    return facts((name, value) for name, value in pairs)


def folded(summary: str, *children: Child) -> Html:
    """Something to unfold."""
    return h("details", h("summary", summary), children)
