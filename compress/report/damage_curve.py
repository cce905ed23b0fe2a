"""Perplexity against the share of parameters removed, one line a pruning method."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from compress.report.charts import Line, log_chart
from compress.report.html import Html, join
from compress.report.svg import figure
from compress.report.values import at, count, fixed, number, percent, short_percent

MOST = 1e300
"""Perplexities from here on are not drawn: a power of ten above them is no number any more."""

_KEY = re.compile(r"([0-9.]+) (.+?) ([0-9]+)(?: seed [0-9]+)?", re.ASCII)

Points = dict[str, dict[str, list[tuple[float, float]]]]
"""Ratio asked for -> (ratio achieved, perplexity) of every seed, by line, by protocol."""


def damage_curve(rows: Mapping[str, Any]) -> Html:
    """The figure of pruning results; one for each protocol that they were measured with.

    Args:
        rows: As `damage_charts` takes them.

    Returns:
        Nothing where no row is left.
    """
    return join(
        [
            figure(
                chart,
                "Perplexity (lower is better) against the share of decoder linear parameters removed"
                + (f": {protocol}." if protocol else "."),
                name="Perplexity by share removed",
            )
            for protocol, chart in damage_charts(rows)
        ]
    )


def damage_charts(rows: Mapping[str, Any]) -> list[tuple[str, Html]]:
    """The drawings alone: protocol and SVG.

    Args:
        rows: "RATIO METHOD TOKENS" (several seeds: with " seed N" after it) -> a record with ``perplexity``,
            ``achieved_ratio`` and ``protocol_line``; TOKENS counts those of recovery training. "dense" is the model
            before pruning. Seeds are averaged. Rows of another form are left out.
    """
    protocols: dict[str, Points] = {}
    for key, row in rows.items():
        match, value = _KEY.fullmatch(key), _perplexity(row)
        achieved = number(at(row, "achieved_ratio"))
        if match is None or value is None or achieved is None or not 0 <= achieved <= 1:
            continue
        ratio, method, tokens = match.groups()
        name = method if int(tokens) == 0 else f"{method}, {count(int(tokens))} tokens"
        lines = protocols.setdefault(_protocol(row), {})
        lines.setdefault(name, {}).setdefault(ratio, []).append((achieved, value))
    return [(protocol, _chart(protocol, points, rows.get("dense"))) for protocol, points in protocols.items()]


def _perplexity(row: Any) -> float | None:
    value = number(at(row, "perplexity"))
    return value if value is not None and 0 < value < MOST else None


def _protocol(row: Any) -> str:
    line = at(row, "protocol_line")
    return line if isinstance(line, str) else ""


def _chart(protocol: str, points: Points, dense: Any) -> Html:
    lines = [
        Line(name=name, points=sorted(_mean(seeds) for seeds in by_ratio.values()))
        for name, by_ratio in points.items()
    ]
    whole = _perplexity(dense) if _protocol(dense) == protocol else None
    told = [
        f"{line.name} {fixed(line.points[0][1])} at {percent(line.points[0][0])}"
        + (
            f" to {fixed(line.points[-1][1])} at {percent(line.points[-1][0])}"
            if len(line.points) > 1
            else ""
        )
        for line in lines
    ]
    if whole is not None:
        told.append(f"not pruned {fixed(whole)}")
    return log_chart(
        lines,
        mark=("not pruned", whole) if whole is not None else None,
        alt=f"Perplexity against the share of parameters removed, by method: {'; '.join(told)}.",
        x_title="decoder linear parameters removed",
        y_title="perplexity, logarithmic",
        x_label=short_percent,
    )


def _mean(seeds: list[tuple[float, float]]) -> tuple[float, float]:
    return sum(x for x, _ in seeds) / len(seeds), sum(y for _, y in seeds) / len(seeds)
