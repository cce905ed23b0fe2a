"""Quality against size, and against speed, of the measured models of one chain."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from compress.report.charts import Line, log_chart
from compress.report.damage_curve import MOST
from compress.report.evaluation import last_evaluation
from compress.report.html import Html, h
from compress.report.svg import figure
from compress.report.values import Record, at, fixed, number, records, short_size, size, string

Points = list[tuple[str, float, float]]
"""Name, x and perplexity of every model."""


def measured_figures(stages: Sequence[Record]) -> Html | None:
    """Perplexity against bytes and against decoding speed, one marker a model; None with fewer than two models."""
    rows = records(at(last_evaluation(stages), "rows"))
    drawn = [
        _figure(measured_points(rows), "weight files", short_size, size, "further left is smaller"),
        _figure(
            measured_points(rows, "decode_tokens_per_second"),
            "decoded tokens/s",
            lambda speed: f"{speed:,g}",
            lambda speed: f"{fixed(speed, 1)} tokens/s",
            "further right is faster",
        ),
    ]
    shown = [one for one in drawn if one is not None]
    return h("div", shown, class_="figures") if shown else None


def measured_points(rows: Sequence[Record], key: str = "bytes") -> Points:
    """The models of an evaluation that have a perplexity and, above zero, what ``key`` names."""
    found = []
    for row in rows:
        x, value = number(row.get(key)), number(row.get("perplexity"))
        if x is not None and value is not None and 0 < x < MOST and 0 < value < MOST:
            found.append((string(row.get("name")), x, value))
    return found


def _figure(
    points: Points, x_title: str, x_label: Callable[[float], str], told: Callable[[float], str], better: str
) -> Html | None:
    if len(points) < 2:
        return None
    words = [f"{name} {fixed(value)} at {told(x)}" for name, x, value in points]
    return figure(
        log_chart(
            [Line(name=name, points=[(x, value)]) for name, x, value in points],
            alt=f"Perplexity against {x_title}: {'; '.join(words)}.",
            x_title=x_title,
            y_title="perplexity, logarithmic",
            x_label=x_label,
        ),
        f"Perplexity (lower is better) against {x_title} ({better}), on the protocol of the table.",
        name=f"Perplexity by {x_title}",
    )
