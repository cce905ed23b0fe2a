"""Tables and lists of facts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from compress.report.html import Child, Html, h
from compress.report.values import DASH, Record, flatten


def table(
    head: Sequence[str], rows: Iterable[Sequence[Child]], *, caption: str | None = None, numeric: bool = True
) -> Html:
    """A table whose first column names the row; the others are right-aligned when ``numeric``.

    It scrolls in a box of its own, which a keyboard reaches; its first column stays in sight. Without ``caption`` it
    gets one that only a screen reader reads: the names of its columns.
    """
    body = [h("tr", h("th", row[0], scope="row"), [h("td", cell) for cell in row[1:]]) for row in rows]
    first, *others = (name or "quantity" for name in head)
    told = caption or f"{first}: {', '.join(others)}"
    return h(
        "div",
        h(
            "table",
            h("caption", h("span", told, class_="hidden") if caption is None else told),
            h("thead", h("tr", [h("th", name, scope="col") for name in head])),
            h("tbody", body),
            class_="numeric" if numeric else None,
        ),
        class_="scroll",
        tabindex="0",
        role="group",
        aria_label=f"{told} (table, scrolls sideways)",
    )


def bar(share: float) -> Html:
    """A bar of a share between 0 and 1, beside a figure that says the same."""
    return h("span", class_="bar", style=f"width:{100 * min(max(share, 0.0), 1.0):.1f}%", aria_hidden="true")


def facts(pairs: Iterable[tuple[str, Child]], *, long: bool = False) -> Html:
    """Name and value pairs, side by side, or one to a line when ``long``."""
    entries = [h("div", h("dt", name), h("dd", value)) for name, value in pairs]
    return h("dl", entries, class_="facts long" if long else "facts")


def record_facts(record: Record) -> Html:
    """A record of any shape as name and value pairs."""
    pairs = list(flatten(record)) if record else [("nothing recorded", DASH)]
    return facts((name, value) for name, value in pairs)


def code_block(lines: Iterable[str], name: str) -> Html:
    """Lines to copy: one click selects them all."""
    return h("pre", h("code", "\n".join(lines)), tabindex="0", role="group", aria_label=name)


def folded(summary: str, *children: Child) -> Html:
    """Something to unfold."""
    return h("details", h("summary", summary), children)
