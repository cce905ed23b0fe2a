"""Charts: a curve over steps, lines over a logarithmic axis, and values over time in spans."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from compress.report.html import Html, h
from compress.report.svg import SMALLEST_SPAN, line_class, log_ticks, marker, nice_ticks, path, svg

MAX_POINTS = 300
NARROW = 2.5
"""Largest over smallest value up to which a logarithmic axis has evenly spaced ticks: the first is above zero."""
CLOSE = 16
"""Distance of two marks up to which the lower one is named under its line."""
LEGEND_NAME = 22
"""Characters of a line's name up to which two fit side by side."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One line of a chart.

    Attributes:
        name: What the legend calls it.
        points: (x, y), y above zero.
        notes: Names of the points, for their tooltips.
        joined: Whether a curve joins the points.
        labelled: Whether the notes are written beside the points.
    """

    name: str
    points: Sequence[tuple[float, float]]
    notes: Sequence[str] = ()
    joined: bool = True
    labelled: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """A stretch of time: its length in seconds, and values measured every ``interval`` seconds from its start.

    ``mark`` is written above it, ``name`` is its tooltip.
    """

    mark: str
    name: str
    seconds: float
    interval: float
    values: Sequence[float]


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
        drawn.append(h("path", d=path([(x_at(x), y_at(y)) for x, y in points]), class_="raw"))
        smooth = _moving_average([y for _, y in points], max(1, len(points) // 12))
        line = [(x_at(x), y_at(y)) for (x, _), y in zip(points, smooth, strict=True)]
        drawn.append(h("path", d=path(line), class_="curve"))
    for n, (name, value) in enumerate(marks):  # last, so that the curve does not cross out the words
        near = any(0 < y_at(value) - y_at(other) < CLOSE for _, other in marks)
        y = y_at(value) + (13 if near else -4)  # under its line where the words over it would meet another's
        drawn.append(h("text", name, x=width - right - 2, y=y, class_=f"tick end marked m{n % 2}"))
    return svg(width, height, alt, drawn, fit=True)


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
    width, left, right, top, plot = 484, 56, 30, 26, 240
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points] + ([mark[1]] if mark is not None else [])
    x_ticks, y_ticks = nice_ticks(min(xs), max(xs)), _levels(min(ys), max(ys))
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
        curve = h("path", d=path(places)) if line.joined and len(places) > 1 else None
        dots = [
            marker(n, *place, _note(line, i, f"{x_label(line.points[i][0])}, {line.points[i][1]:,.4g}"))
            for i, place in enumerate(places)
        ]
        if line.labelled:
            drawn += [
                _beside(note, *place, right=width) for note, place in zip(line.notes, places, strict=False)
            ]
        legend_x, legend_y = left + 212 * (n % columns), bottom + 54 + 18 * (n // columns)
        sample = h("path", d=path([(legend_x, legend_y - 4), (legend_x + 26, legend_y - 4)]), class_="sample")
        shape = marker(n, legend_x + 13, legend_y - 4)
        drawn.append(h("g", curve, dots, sample, shape, class_=line_class(n)))
        drawn.append(h("text", line.name, x=legend_x + 34, y=legend_y, class_="tick"))
    return svg(width, bottom + 64 + 18 * ((len(lines) - 1) // columns), alt, drawn, fit=True)


def time_chart(spans: Sequence[Span], *, alt: str, y_title: str, y_label: Callable[[float], str]) -> Html:
    """Values over the seconds of one span after the other, filled down to zero, each marked at its top.

    Args:
        spans: At least one, of more than zero seconds together.
        alt: Description for those who do not see it.
        y_title: What the values are.
        y_label: How a tick of the y axis is written.
    """
    width, height, left, right, top, bottom = 720, 250, 62, 14, 44, 36
    base, whole = height - bottom, sum(span.seconds for span in spans)
    y_ticks = nice_ticks(0.0, max((value for span in spans for value in span.values), default=1.0) or 1.0)

    def x_at(seconds: float) -> float:
        return left + (width - left - right) * min(seconds / whole, 1.0)

    def y_at(value: float) -> float:
        return base - (base - top) * value / y_ticks[-1]

    drawn: list[Html] = []
    for tick in y_ticks:
        y = y_at(tick)
        drawn.append(h("line", x1=left, x2=width - right, y1=y, y2=y, class_="grid"))
        drawn.append(h("text", y_label(tick), x=left - 6, y=y + 4, class_="tick end"))
    unit, name = (60.0, "minutes") if whole >= 180 else (1.0, "seconds")
    times = [tick for tick in nice_ticks(0.0, whole / unit) if tick * unit <= whole * (1 + 1e-9)]
    drawn += [h("text", f"{t:g}", x=x_at(t * unit), y=base + 16, class_="tick middle") for t in times]
    drawn.append(h("text", name, x=(left + width - right) / 2, y=height - 4, class_="tick middle"))
    drawn.append(h("text", y_title, x=left, y=14, class_="tick"))
    start = 0.0
    for span in spans:
        x0, x1 = x_at(start), x_at(start + span.seconds)
        drawn.append(h("line", x1=x0, x2=x0, y1=top - 8, y2=base, class_="edge"))
        if x1 - x0 >= 7 * len(span.mark) + 2:  # else it would lie on the next one's
            drawn.append(h("text", span.mark, x=x0 + 4, y=top - 4, class_="tick"))
        steps = [
            (x_at(start + min(edge * span.interval, span.seconds)), y_at(value))
            for i, value in enumerate(span.values)
            for edge in (i, i + 1)
        ]
        if steps:
            steps[-1] = (x1, steps[-1][1])
            drawn.append(
                h(
                    "path",
                    h("title", span.name),
                    d=path([(steps[0][0], base), *steps, (steps[-1][0], base)]) + "Z",
                    class_="area",
                )
            )
        start += span.seconds
    return svg(width, height, alt, drawn)


def _levels(low: float, high: float) -> list[float]:
    """Ticks of a logarithmic axis; between close values there are round numbers of any kind."""
    if low > SMALLEST_SPAN and high <= NARROW * low:
        return nice_ticks(low, high)
    return log_ticks(low, high)


def _beside(note: str, x: float, y: float, *, right: float) -> Html:
    """A point's name, on the side of it where there is more room."""
    if x < right / 2:
        return h("text", note, x=x + 7, y=y + 4, class_="tick marked")
    return h("text", note, x=x - 7, y=y + 4, class_="tick end marked")


def _note(line: Line, point: int, values: str) -> str:
    own = f", {line.notes[point]}" if point < len(line.notes) else ""
    return f"{line.name}{own}: {values}"


def _moving_average(values: Sequence[float], reach: int) -> list[float]:
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    windows = [(max(0, i - reach), min(len(values), i + reach + 1)) for i in range(len(values))]
    return [(sums[stop] - sums[start]) / (stop - start) for start, stop in windows]
