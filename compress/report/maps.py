"""Maps of a model's layers: a heat map of any value, and what pruning kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from compress.report.html import Html, h
from compress.report.svg import svg

SHADES = 7
"""Steps of the heat map's colour scale, classes ``h0`` to ``h6``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One cell of a heat map: its value (None: empty), what is written in it, and its tooltip."""

    value: float | None
    label: str
    note: str


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptLayer:
    """What is left of one layer: indices of KV groups, query heads in each of them, and the share of channels."""

    groups: frozenset[int]
    queries: int | None
    channels: float


def heat_map(
    rows: Sequence[str], columns: Sequence[str], cells: Sequence[Sequence[Cell]], *, unit: str, alt: str
) -> Html:
    """Rows by columns, shaded by value over seven steps between the smallest and the largest; with a legend."""
    left, top, cell_width, cell_height = 36, 22, 42, 18
    known = [cell.value for row in cells for cell in row if cell.value is not None]
    low, high = (min(known), max(known)) if known else (0.0, 0.0)

    def shade(value: float | None) -> str:
        if value is None:
            return "none"
        share = (value - low) / (high - low) if high > low else 0.5
        return f"h{min(int(share * SHADES), SHADES - 1)}"

    drawn = [
        h("text", name, x=left + cell_width * (j + 0.5), y=top - 8, class_="tick middle")
        for j, name in enumerate(columns)
    ]
    for i, (name, row) in enumerate(zip(rows, cells, strict=True)):
        y = top + cell_height * i
        drawn.append(h("text", name, x=left - 6, y=y + 13, class_="tick end"))
        for j, cell in enumerate(row):
            x, tone = left + cell_width * j, shade(cell.value)
            box = h("rect", x=x + 1, y=y + 1, width=cell_width - 2, height=cell_height - 2, rx=2)
            label = h("text", cell.label, x=x + cell_width / 2, y=y + 13, class_="cell middle")
            drawn.append(h("g", h("title", cell.note), box, label, class_=tone))
    width = left + cell_width * max(len(columns), 6) + 4
    base = top + cell_height * len(rows) + 14
    for step in range(SHADES if high > low else 0):
        x = left + step * 26
        drawn.append(h("g", h("rect", x=x, y=base, width=26, height=10), class_=f"h{step}"))
    drawn.append(h("text", f"{low:.3g}", x=left, y=base + 24, class_="tick"))
    drawn.append(h("text", unit, x=left + SHADES * 13, y=base + 24, class_="tick middle"))
    if high > low:
        drawn.append(h("text", f"{high:.3g}", x=left + SHADES * 26, y=base + 24, class_="tick end"))
    return svg(width, base + 30, alt, drawn)


def kept_map(layers: Sequence[KeptLayer], *, total: int, queries: int | None, alt: str) -> Html:
    """Per layer: a square for each KV group, filled where it is kept, a bar of the channels kept, both in figures too.

    Args:
        layers: What every layer keeps.
        total: KV groups before pruning.
        queries: Query heads in each group before pruning; None where that was not recorded.
        alt: Description for those who do not see it.
    """
    left, top, row, bar = 40, 22, 16, 120
    side = 14 if total <= 16 else max(4.0, 224 / total)
    heads_left = left + max(side * total, 56) + 8
    bar_left = heads_left + 62
    drawn = [
        h("text", "KV groups", x=left, y=top - 8, class_="tick"),
        h("text", "heads" if queries else "groups", x=heads_left, y=top - 8, class_="tick"),
        h("text", "channels", x=bar_left, y=top - 8, class_="tick"),
    ]
    per_group = queries or 1
    for i, layer in enumerate(layers):
        y, kept = top + row * i, layer.groups
        drawn.append(h("text", str(i), x=left - 6, y=y + 12, class_="tick end"))
        boxes = [
            h("path", d="".join(_square(left + side * n, y, side, row) for n in found), class_=tone)
            for tone, found in (
                ("kept", [n for n in range(total) if n in kept]),
                ("gone", [n for n in range(total) if n not in kept]),
            )
            if found
        ]
        heads = len(kept) * (layer.queries if layer.queries is not None else per_group)
        written = f"{heads} of {total * per_group}"
        share = layer.channels
        note = (
            f"layer {i}: {len(kept)} of {total} KV groups, "
            + (f"{written} query heads, " if queries else "")
            + f"{100 * share:.1f} % of the channels"
        )
        drawn.append(
            h(
                "g",
                h("title", note),
                boxes,
                h("rect", x=bar_left, y=y + 3.5, width=bar, height=row - 7, rx=2, class_="gone"),
                h("rect", x=bar_left, y=y + 3, width=bar * share, height=row - 6, rx=2, class_="kept")
                if share > 0
                else None,
            )
        )
        drawn.append(h("text", written, x=heads_left, y=y + 12, class_="tick"))
        drawn.append(h("text", f"{100 * share:.0f} %", x=bar_left + bar + 6, y=y + 12, class_="tick"))
    return svg(max(bar_left + bar + 46, 330), top + row * len(layers) + 6, alt, drawn)


def _square(x: float, y: float, side: float, row: float) -> str:
    """One square of the row at ``y``, drawn as a part of a path: a whole model has thousands."""
    gap = 1.0 if side >= 6 else 0.5
    return f"M{x + gap:.4g},{y + 1.5:.4g}h{side - 2 * gap:.4g}v{row - 3:.4g}h{2 * gap - side:.4g}z"
