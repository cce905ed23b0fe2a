"""Figures as inline SVG: colours come from the page's style sheet, so that they follow light and dark."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from compress.report.html import Child, Html, h

SHADES = 7
"""Steps of the heat map's colour scale, classes ``h0`` to ``h6``."""
COLOURS = 8
"""Colours of the lines of one chart, classes ``c0`` to ``c7``; further lines are dashed."""
MAX_POINTS = 300
SMALLEST_SPAN = 1e-300
LEGEND_NAME = 34
"""Characters of a line's name up to which two fit side by side."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One cell of a heat map: its value (None: empty), what is written in it, and its tooltip."""

    value: float | None
    label: str
    note: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One line of a chart: its name and its points (x, y), y above zero."""

    name: str
    points: Sequence[tuple[float, float]]


def figure(svg: Html, caption: Child) -> Html:
    """A drawing with its caption."""
    return h("figure", h("div", svg, class_="plot"), h("figcaption", caption))


def line_chart(
    values: Sequence[float], *, marks: Sequence[tuple[str, float]], alt: str, x_title: str, y_title: str
) -> Html:
    """A curve over steps 1.. with its moving average, and dashed horizontal marks.

    Long curves are averaged down to 300 points.
    """
    width, height, left, right, top, bottom = 420, 240, 46, 12, 26, 36
    steps = len(values)
    stride = max(1, math.ceil(steps / MAX_POINTS))
    points = [
        (start + (len(chunk) + 1) / 2, sum(chunk) / len(chunk))
        for start in range(0, steps, stride)
        if (chunk := values[start : start + stride])
    ]
    levels = [y for _, y in points] + [y for _, y in marks]
    ticks = nice_ticks(min(levels), max(levels))
    low, high = ticks[0], ticks[-1]

    def x_at(step: float) -> float:
        return left + (width - left - right) * ((step - 1) / (steps - 1) if steps > 1 else 0.5)

    def y_at(value: float) -> float:
        return top + (height - top - bottom) * (1 - (value - low) / (high - low))

    drawn: list[Html] = []
    for tick in ticks:
        y = y_at(tick)
        drawn.append(h("line", x1=left, x2=width - right, y1=y, y2=y, class_="grid"))
        drawn.append(h("text", f"{tick:g}", x=left - 6, y=y + 4, class_="tick end"))
    shown = sorted({1, *(step for step in map(int, nice_ticks(1, max(steps, 2))) if 1 < step <= steps)})
    drawn += [h("text", str(s), x=x_at(s), y=height - bottom + 16, class_="tick middle") for s in shown]
    drawn.append(h("text", x_title, x=(left + width - right) / 2, y=height - 4, class_="tick middle"))
    drawn.append(h("text", y_title, x=left, y=top - 12, class_="tick"))
    for n, (_, value) in enumerate(marks):
        y = y_at(value)
        drawn.append(h("line", x1=left, x2=width - right, y1=y, y2=y, class_=f"mark m{n % 2}"))
    if len(points) == 1:
        drawn.append(h("circle", cx=x_at(points[0][0]), cy=y_at(points[0][1]), r=3, class_="dot"))
    else:
        drawn.append(h("path", d=_path([(x_at(x), y_at(y)) for x, y in points]), class_="raw"))
        smooth = _moving_average([y for _, y in points], max(1, len(points) // 12))
        line = [(x_at(x), y_at(y)) for (x, _), y in zip(points, smooth, strict=True)]
        drawn.append(h("path", d=_path(line), class_="curve"))
    for n, (name, value) in enumerate(marks):  # last, so that the curve does not cross out the words
        drawn.append(
            h("text", name, x=width - right - 2, y=y_at(value) - 4, class_=f"tick end marked m{n % 2}")
        )
    return _svg(width, height, alt, drawn)


def log_chart(
    lines: Sequence[Line],
    *,
    mark: tuple[str, float] | None = None,
    alt: str,
    x_title: str,
    y_title: str,
    x_label: Callable[[float], str],
) -> Html:
    """Several lines over a logarithmic y axis, a dashed horizontal mark, and the lines' names under it.

    Args:
        lines: At least one, each with at least one point.
        mark: A name and a y above zero.
        alt: Description for those who do not see it.
        x_title: What x is.
        y_title: What y is.
        x_label: How a tick of the x axis is written.
    """
    width, left, right, top, plot = 560, 52, 14, 26, 240
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points] + ([mark[1]] if mark is not None else [])
    x_ticks, y_ticks = nice_ticks(min(xs), max(xs)), log_ticks(min(ys), max(ys))
    bottom, first, last = top + plot, math.log(y_ticks[0]), math.log(y_ticks[-1])

    def x_at(x: float) -> float:
        return left + (width - left - right) * (x - x_ticks[0]) / (x_ticks[-1] - x_ticks[0])

    def y_at(y: float) -> float:
        return bottom - plot * (math.log(y) - first) / (last - first)

    drawn: list[Html] = []
    for tick in y_ticks:
        y = y_at(tick)
        drawn.append(h("line", x1=left, x2=width - right, y1=y, y2=y, class_="grid"))
        drawn.append(h("text", f"{tick:,g}", x=left - 6, y=y + 4, class_="tick end"))
    drawn += [h("text", x_label(x), x=x_at(x), y=bottom + 16, class_="tick middle") for x in x_ticks]
    drawn.append(h("text", x_title, x=(left + width - right) / 2, y=bottom + 32, class_="tick middle"))
    drawn.append(h("text", y_title, x=left, y=top - 12, class_="tick"))
    if mark is not None:
        y = y_at(mark[1])
        drawn.append(h("line", x1=left, x2=width - right, y1=y, y2=y, class_="mark m0"))
        drawn.append(h("text", mark[0], x=width - right - 2, y=y - 4, class_="tick end marked m0"))
    columns = 2 if max(len(line.name) for line in lines) <= LEGEND_NAME else 1
    for n, line in enumerate(lines):
        places = [(x_at(x), y_at(y)) for x, y in line.points]
        dots = [
            h("circle", h("title", f"{line.name}: {x_label(x)}, {y:,.4g}"), cx=at[0], cy=at[1], r=3)
            for (x, y), at in zip(line.points, places, strict=True)
        ]
        path = h("path", d=_path(places)) if len(places) > 1 else None
        legend_x, legend_y = left + 250 * (n % columns), bottom + 54 + 18 * (n // columns)
        sample = h("path", d=_path([(legend_x, legend_y - 4), (legend_x + 26, legend_y - 4)]))
        drawn.append(h("g", path, dots, sample, class_=line_class(n)))
        drawn.append(h("text", line.name, x=legend_x + 34, y=legend_y, class_="tick"))
    return _svg(width, bottom + 64 + 18 * ((len(lines) - 1) // columns), alt, drawn)


def line_class(n: int) -> str:
    """Style classes of the ``n``-th line of a chart."""
    return f"line c{n % COLOURS}" + (" dashed" if n // COLOURS % 2 else "")


def heat_map(
    rows: Sequence[str], columns: Sequence[str], cells: Sequence[Sequence[Cell]], *, unit: str, alt: str
) -> Html:
    """Rows by columns, shaded by value over seven steps between the smallest and the largest; with a legend."""
    left, top, cell_width, cell_height = 40, 22, 50, 18
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
    return _svg(width, base + 30, alt, drawn)


def kept_map(groups: Sequence[frozenset[int]], total: int, widths: Sequence[float], *, alt: str) -> Html:
    """Per layer: a square for each KV group, filled where it is kept, and a bar for the share of channels.

    Args:
        groups: Kept KV groups of every layer.
        total: KV groups before pruning.
        widths: Share of channels kept, by layer.
        alt: Description for those who do not see it.
    """
    left, top, row, bar = 40, 22, 16, 120
    side = 14 if total <= 16 else max(4.0, 224 / total)
    bar_left = left + max(side * total, 56) + 16
    drawn = [
        h("text", "KV groups", x=left, y=top - 8, class_="tick"),
        h("text", "channels", x=bar_left, y=top - 8, class_="tick"),
    ]
    for i, (kept, share) in enumerate(zip(groups, widths, strict=True)):
        y = top + row * i
        drawn.append(h("text", str(i), x=left - 6, y=y + 12, class_="tick end"))
        boxes = [
            h(
                "rect",
                x=left + side * n + 1,
                y=y + 1,
                width=side - 2,
                height=row - 2,
                rx=2,
                class_="kept" if n in kept else "gone",
            )
            for n in range(total)
        ]
        note = f"layer {i}: {len(kept)} of {total} KV groups, {100 * share:.1f} % of the channels"
        drawn.append(
            h(
                "g",
                h("title", note),
                boxes,
                h("rect", x=bar_left, y=y + 3, width=bar, height=row - 6, rx=2, class_="gone"),
                h("rect", x=bar_left, y=y + 3, width=bar * share, height=row - 6, rx=2, class_="kept"),
            )
        )
        drawn.append(h("text", f"{100 * share:.0f} %", x=bar_left + bar + 6, y=y + 12, class_="tick"))
    return _svg(max(bar_left + bar + 46, 330), top + row * len(groups) + 6, alt, drawn)


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


def _moving_average(values: Sequence[float], reach: int) -> list[float]:
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    windows = [(max(0, i - reach), min(len(values), i + reach + 1)) for i in range(len(values))]
    return [(sums[stop] - sums[start]) / (stop - start) for start, stop in windows]


def _path(points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.1f},{y:.1f}" for x, y in points)


def _svg(width: float, height: float, alt: str, drawn: Sequence[Html]) -> Html:
    return h(
        "svg",
        h("title", alt),
        drawn,
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {width:g} {height:g}",
        width=width,
        height=height,
        role="img",
        aria_label=alt,
    )
