"""What other budgets would have cost: the allocation's cost against stored bits per weight."""

from __future__ import annotations

from typing import Any

from compress.report.charts import Line, log_chart
from compress.report.damage_curve import MOST
from compress.report.html import Html
from compress.report.svg import figure
from compress.report.values import at, fixed, general, number, records, string


def tradeoff_figure(metrics: Any) -> Html | None:
    """The curve of a quantized stage, with its own budget marked; None where it was not recorded.

    Args:
        metrics: With ``tradeoff`` (``cost`` in words, and ``points``: ``bits_per_weight`` and ``cost`` of each budget),
            ``stored_bits_per_weight`` and ``allocation.objective``. Points that cost nothing are left out.
    """
    curve = at(metrics, "tradeoff")
    points = []
    for record in records(at(curve, "points")):
        bits, cost = number(record.get("bits_per_weight")), number(record.get("cost"))
        if bits is not None and cost is not None and 0 < bits < MOST and 0 < cost < MOST:
            points.append((bits, cost))
    if len(points) < 2:
        return None
    points.sort()
    lines = [Line(name="other budgets", points=points)]
    bits, cost = number(at(metrics, "stored_bits_per_weight")), number(at(metrics, "allocation", "objective"))
    (low, dear), (high, cheap) = points[0], points[-1]
    told = f"{general(dear, 3)} at {fixed(low)} bits to {general(cheap, 3)} at {fixed(high)}"
    if bits is not None and cost is not None and 0 < bits < MOST and 0 < cost < MOST:
        lines.append(Line(name="this model", points=[(bits, cost)]))
        told += f"; this model {general(cost, 3)} at {fixed(bits)}"
    kind = string(at(curve, "cost"))
    return figure(
        log_chart(
            lines,
            alt=f"Least cost of an allocation against stored bits per weight: {told}.",
            x_title="stored bits per weight of the decoder matrices",
            y_title=f"{kind}, logarithmic",
            x_label=lambda value: f"{value:g}",
        ),
        f"The least cost ({kind}) that the same formats and ranks reach under other budgets.",
        name="Cost by bits",
    )
