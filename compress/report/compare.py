"""Several runs side by side: one table, their models on one chart, and curves over what the runs differ in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from compress.report.charts import Line, log_chart
from compress.report.damage_curve import MOST
from compress.report.evaluation import last_evaluation
from compress.report.html import Html, h, join
from compress.report.measured import measured_points
from compress.report.stages import perplexity, stored_bits
from compress.report.svg import figure
from compress.report.table import facts, table
from compress.report.values import (
    DASH,
    Record,
    at,
    fixed,
    number,
    percent,
    records,
    seconds,
    short_percent,
    short_size,
    size,
    string,
)

FULL = ("original", "full + recovered")
"""Measured models that are as large as the one the chain started from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One run of a comparison: its name and the records of its stages."""

    name: str
    stages: Sequence[Record]


def comparison(runs: Sequence[Run]) -> Html | None:
    """The section; None with fewer than two runs."""
    if len(runs) < 2:
        return None
    protocols = list(dict.fromkeys(line for run in runs for line, _ in _numbers(run)))
    letters = {line: chr(ord("a") + n) if n < 26 else str(n) for n, line in enumerate(protocols)}
    several = len(protocols) > 1
    head = (
        "Run",
        "Weights",
        "Smaller by",
        "Bits per linear weight",
        "Parameters removed",
        "Perplexity, original",
        "Perplexity, small model",
        "Perplexity, full + recovered",
        "Time",
        "Stages",
    )
    rows = [_row(run, letters if several else {}) for run in runs]
    note: Html | None
    if several:
        note = join(
            h(
                "p",
                "The letters after perplexities are their protocols; only equal letters compare.",
                class_="note",
            ),
            facts([(letters[line], line or "not recorded") for line in protocols], long=True),
        )
    else:
        note = (
            h("p", f"Perplexity (lower is better): {protocols[0] or DASH}.", class_="note")
            if protocols
            else None
        )
    return h(
        "section",
        h("h2", "Runs compared"),
        table(head, rows, caption="The runs, the page's own first"),
        note,
        h(
            "div",
            [_sizes(runs, protocol) for protocol in protocols],
            _curve(runs, _bits, "stored bits per linear weight", fixed),
            _curve(runs, _ratio, "decoder linear parameters removed", short_percent),
            class_="figures",
        ),
        id="runs",
    )


def _row(run: Run, letters: dict[str, str]) -> list[str]:
    makers = [s for s in run.stages if at(s, "metrics", "after", "bytes") is not None]
    before = number(at(makers[0], "metrics", "before", "bytes")) if makers else None
    after = number(at(makers[-1], "metrics", "after", "bytes")) if makers else None
    times = [t for s in run.stages if (t := number(s.get("seconds"))) is not None]
    shown = {"original": DASH, "small": DASH, "full + recovered": DASH}
    for line, row in _numbers(run):
        name = string(row.get("name"))
        # The last small model of the chain: rows are in the order of its stages.
        shown[name if name in FULL else "small"] = f"{perplexity(row)} {letters.get(line, '')}".strip()
    return [
        run.name,
        size(after),
        f"{before / after:.2f}×" if before and after else DASH,
        fixed(_bits(run)),
        percent(_ratio(run)),
        *shown.values(),
        seconds(sum(times)) if times else DASH,
        " → ".join(string(s.get("verb")) for s in run.stages) or DASH,
    ]


def _numbers(run: Run) -> list[tuple[str, Record]]:
    """Protocol and row of every model that the run evaluated; else what its last stage with a model measured."""
    metrics = last_evaluation(run.stages)
    rows = [row for row in records(at(metrics, "rows")) if perplexity(row) != DASH]
    if rows:
        return [(_line(metrics), row) for row in rows]
    sides = [
        at(s, "metrics", "after") for s in run.stages if at(s, "metrics", "after", "perplexity") is not None
    ]
    if not sides or perplexity(sides[-1]) == DASH:
        return []
    return [(_line(sides[-1]), {**sides[-1], "name": "small"})]


def _line(measured: Any) -> str:
    line = at(measured, "protocol_line")
    return line if isinstance(line, str) else ""


def _sizes(runs: Sequence[Run], protocol: str) -> Html | None:
    """All models of all runs that were measured on one protocol."""
    lines = []
    for run in runs:
        rows = [row for line, row in _numbers(run) if line == protocol]
        found = sorted(measured_points(rows), key=lambda point: (point[1], point[2]))
        if found:
            lines.append(
                Line(
                    joined=False,
                    name=run.name,
                    points=[(x, y) for _, x, y in found],
                    notes=[name for name, _, _ in found],
                )
            )
    if not lines:
        return None
    told = [
        f"{line.name}: "
        + ", ".join(
            f"{note} {fixed(y)} at {size(x)}" for note, (x, y) in zip(line.notes, line.points, strict=True)
        )
        for line in lines
    ]
    return figure(
        log_chart(
            lines,
            alt=f"Perplexity against the size of the weight files, by run. {'; '.join(told)}.",
            x_title="weight files",
            y_title="perplexity, logarithmic",
            x_label=short_size,
        ),
        "Perplexity (lower is better) against the size of the weight files, all models of every run"
        + (f": {protocol}." if protocol else "."),
        name="Perplexity by size",
    )


def _curve(
    runs: Sequence[Run], x_of: Callable[[Run], float | None], x_title: str, x_label: Callable[[float], str]
) -> list[Html]:
    """Perplexity of the small models over what the runs differ in, one chart a protocol, from two values on."""
    protocols: dict[str, list[tuple[float, float, str]]] = {}
    for run in runs:
        x = x_of(run)
        small = [(line, row) for line, row in _numbers(run) if string(row.get("name")) not in FULL]
        y = number(at(small[-1][1], "perplexity")) if small else None
        if x is not None and y is not None and 0 <= x < MOST and 0 < y < MOST:
            protocols.setdefault(small[-1][0], []).append((x, y, run.name))
    drawn = []
    for protocol, points in protocols.items():
        points.sort()
        if len({x for x, _, _ in points}) < 2:
            continue
        line = Line(
            name="small model of each run",
            points=[(x, y) for x, y, _ in points],
            notes=[name for _, _, name in points],
            labelled=True,
            joined=len({x for x, _, _ in points}) == len(points),
        )
        told = "; ".join(f"{name} {fixed(y)} at {x_label(x)}" for x, y, name in points)
        drawn.append(
            figure(
                log_chart(
                    [line],
                    alt=f"Perplexity of each run's small model against {x_title}: {told}.",
                    x_title=x_title,
                    y_title="perplexity, logarithmic",
                    x_label=x_label,
                ),
                f"Perplexity (lower is better) of each run's last small model against {x_title}"
                + (f": {protocol}." if protocol else "."),
                name=f"Perplexity by {x_title}",
            )
        )
    return drawn


def _bits(run: Run) -> float | None:
    """Stored bits per linear weight of the last quantized model."""
    sides = [at(s, "metrics", "after") for s in run.stages if s.get("verb") == "quantize"]
    return stored_bits(sides[-1]) if sides else None


def _ratio(run: Run) -> float | None:
    """Share of the decoder's linear parameters that pruning removed or set to zero."""
    for stage in run.stages:
        if stage.get("verb") == "prune":
            masked = number(at(stage, "metrics", "masked_ratio"))
            return masked if masked is not None else number(at(stage, "metrics", "achieved_ratio"))
    return None
