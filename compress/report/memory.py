"""Time and memory: what every stage took, and the resident memory over the seconds of the whole chain."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from compress.report.charts import Span, time_chart
from compress.report.html import Child, Html, h
from compress.report.svg import figure
from compress.report.table import bar, table
from compress.report.values import DASH, Record, at, number, numbers, seconds, short_size, size, string

_MOST = 1e15
"""Seconds and bytes from here on are no measurements."""
PLACES = {"device": "on the GPU", "host": "on the host"}
"""Where a stage holds memory, in words."""


def stage_peak(stage: Record, place: str) -> float | None:
    """Peak bytes of a stage on "device" or "host"; None where it says nothing of it.

    A record without `peak_host_bytes` is older: its `peak_memory_bytes` is the host's.
    """
    found = _plausible(stage.get(f"peak_{place}_bytes"))
    if found is None and place == "host" and "peak_host_bytes" not in stage:
        found = _plausible(stage.get("peak_memory_bytes"))
    return found


def peaks(stage: Record) -> str:
    """The peaks of a stage in words."""
    found = {place: stage_peak(stage, place) for place in PLACES}
    return ", ".join(f"{size(peak)} {PLACES[place]}" for place, peak in found.items() if peak) or DASH


def cost_section(stages: Sequence[Record]) -> Html | None:
    """Table and timeline; None where no stage says what it took."""
    times = [_plausible(stage.get("seconds")) for stage in stages]
    held = {name: [stage_peak(stage, name) for stage in stages] for name in PLACES}
    shown = {name: column for name, column in held.items() if any(peak is not None for peak in column)}
    if not any(
        value is not None for value in [*times, *(peak for column in shown.values() for peak in column)]
    ):
        return None
    rows: list[list[Child]] = [
        [
            f"{n} {string(stage.get('verb'))}",
            _cell(time, times, seconds),
            *(_cell(column[n - 1], column, size) for column in shown.values()),
        ]
        for n, (stage, time) in enumerate(zip(stages, times, strict=True), start=1)
    ]
    return h(
        "section",
        h("h2", "Time and memory"),
        h(
            "div",
            table(
                ("Stage", "Time", *(f"Peak memory {PLACES[name]}" for name in shown)),
                rows,
                caption="What every stage took",
            ),
            timeline_figure(stages),
            timeline_figure(stages, device=True),
            class_="figures",
        ),
        id="cost",
    )


def timeline_figure(stages: Sequence[Record], *, device: bool = False) -> Html | None:
    """Memory over time, stage after stage: resident, or what torch held on a GPU; None where no stage recorded it."""
    key, name, what = (
        ("device_bytes", "GPU memory timeline", "memory allocated on the GPU")
        if device
        else ("host_bytes", "Memory timeline", "resident memory of the process")
    )
    spans = [span for n, stage in enumerate(stages, start=1) if (span := _span(stage, n, key)) is not None]
    drawn = [span for span in spans if span.values]
    if not drawn or sum(span.seconds for span in spans) <= 0:
        return None
    highest = max(max(span.values) for span in drawn)
    told = "; ".join(f"{span.name} up to {size(max(span.values))}" for span in drawn)
    left_out = [span.name for span in spans if not span.values]
    gap = f" Not recorded by: {', '.join(left_out)}." if left_out else ""
    return figure(
        time_chart(
            spans,
            alt=f"{name} over {seconds(sum(s.seconds for s in spans))}, highest {size(highest)}: {told}.{gap}",
            y_title=what,
            y_label=short_size,
        ),
        f"{what.capitalize()}, stage after stage in the order above, sampled once a second or less often.{gap} "
        "Peaks between two samples are in the table only.",
        name=name,
    )


def _span(stage: Record, n: int, key: str) -> Span | None:
    took = _plausible(stage.get("seconds"))
    if took is None:
        return None
    record = stage.get("memory_timeline")
    interval = _plausible(at(record, "interval_seconds"))
    values = [v for v in numbers(at(record, key)) if 0 <= v < _MOST] if interval else []
    return Span(
        mark=str(n),
        name=f"{n} {string(stage.get('verb'))}",
        seconds=took,
        interval=interval or took,
        values=values,
    )


def _plausible(value: object) -> float | None:
    found = number(value)
    return found if found is not None and 0 <= found < _MOST else None


def _cell(value: float | None, column: Sequence[float | None], write: Callable[[float], str]) -> Child:
    if value is None:
        return DASH
    largest = max((v for v in column if v is not None), default=0.0)
    return [write(value), bar(value / largest) if largest > 0 else None]
