"""What every drawing is made of: a frame, axes with round numbers, paths and markers.

Colours come from the page's style sheet, so that they follow light, dark and print. A colour never stands alone:
lines differ in the shape of their markers, cells carry their value, what is gone is an empty box.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from compress.report.html import Child, Html, h, text

COLOURS = 8
"""Colours of the lines of one chart, classes ``c0`` to ``c7``; further lines are dashed."""
SHAPES = 7
"""Shapes of markers: with eight colours, 56 lines before both repeat."""
SMALLEST_SPAN = 1e-300
_RADIUS = 3.8
_PLUS = tuple(
    (a * turn[0] - b * turn[1], a * turn[1] + b * turn[0])
    for turn in ((1, 0), (0, 1), (-1, 0), (0, -1))
    for a, b in ((1.3, -0.4), (1.3, 0.4), (0.4, 0.4))
)
"""Corners of a cross around its middle, for a radius of one."""


def figure(svg: Html, caption: Child, *, name: str = "Figure") -> Html:
    """A drawing in a box that scrolls by itself (``name`` tells what is scrolled), with its caption."""
    box = h("div", svg, class_="plot", tabindex="0", role="group", aria_label=f"{name}, scrolls sideways")
    return h("figure", box, h("figcaption", caption))


def svg(width: float, height: float, alt: str, drawn: Sequence[Html], *, fit: bool = False) -> Html:
    """The frame of a drawing; ``alt`` says everything it shows to those who do not see it.

    With ``fit`` it shrinks to a narrow screen and its letters grow; without, its box scrolls.
    """
    return h(
        "svg",
        drawn,
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {width:g} {height:g}",
        width=width,
        height=height,
        role="img",
        aria_label=alt,
        class_="fit" if fit else None,
    )


def svg_file(drawing: Html, style: str) -> str:
    """A drawing of `svg` as a file of its own, with the stylesheet in it and the page's colour behind it."""
    head, _, rest = drawing.partition(">")
    rules = text(f"{style}\nsvg {{ background: var(--card); font-family: sans-serif; }}")
    return f"{head}><style>{rules}</style>{rest}\n"


def path(points: Sequence[tuple[float, float]]) -> str:
    """The ``d`` of a line through points."""
    return "M" + "L".join(f"{x:.1f},{y:.1f}" for x, y in points)


def line_class(n: int) -> str:
    """Style classes of the ``n``-th line of a chart."""
    return f"line c{n % COLOURS}" + (" dashed" if n // COLOURS % 2 else "")


def marker(n: int, x: float, y: float, note: str | None = None) -> Html:
    """The ``n``-th line's marker, its middle at (x, y): disc, square, triangle, diamond, and so on."""
    title = h("title", note) if note is not None else None
    r = _RADIUS
    if n % SHAPES == 0:
        return h("circle", title, cx=x, cy=y, r=r, class_="mk")
    corners = {
        1: ((-r, -r), (r, -r), (r, r), (-r, r)),
        2: ((0.0, -4 / 3 * r), (1.2 * r, 2 / 3 * r), (-1.2 * r, 2 / 3 * r)),
        3: ((0.0, -1.4 * r), (1.4 * r, 0.0), (0.0, 1.4 * r), (-1.4 * r, 0.0)),
        4: ((0.0, 4 / 3 * r), (1.2 * r, -2 / 3 * r), (-1.2 * r, -2 / 3 * r)),
        5: tuple((r * a, r * b) for a, b in _PLUS),
        6: tuple((0.75 * r * (a - b), 0.75 * r * (a + b)) for a, b in _PLUS),
    }[n % SHAPES]
    return h("path", title, d=path([(x + a, y + b) for a, b in corners]) + "Z", class_="mk")


def nice_ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Round numbers that enclose ``low`` and ``high``, about ``wanted`` of them, two at least."""
    if high - low <= max(1e-6 * max(abs(low), abs(high)), SMALLEST_SPAN):
        pad = abs(low) * 0.05 or 0.5
        low, high = low - pad, high + pad
    raw = (high - low) / (wanted - 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first = math.floor(low / step + 1e-9)
    last = max(math.ceil(high / step - 1e-9), first + 1)
    return [round(n * step, max(0, 2 - math.floor(math.log10(raw)))) for n in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Values of the form 1, 2 or 5 times a power of ten that enclose ``low`` and ``high``, both above zero.

    Two at least and nine at most; over many powers only some of the powers themselves.
    """
    first, last = math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high) - 1e-9)
    last = max(last, first + 1)
    every = [m * 10.0**power for power in range(first, last) for m in (1, 2, 5)] + [10.0**last]
    start = max(n for n, tick in enumerate(every[:-1]) if tick <= low * (1 + 1e-9) or n == 0)
    stop = min(n for n, tick in enumerate(every) if tick >= high * (1 - 1e-9) and n > start)
    if stop - start < 9:
        return every[start : stop + 1]
    stride = math.ceil((last - first) / 8)
    return [10.0**power for power in range(first, last + stride, stride)]
