"""The error spectrum: what quantization did to every matrix, by layer and kind, and the matrices it hurt most."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from compress.report.allocation import locate
from compress.report.charts import Line, log_chart
from compress.report.damage_curve import MOST
from compress.report.html import Html
from compress.report.svg import figure
from compress.report.table import table
from compress.report.values import Record, at, fixed, general, number, records, string

MEASURES = (
    ("relative_output_error", "relative error of the outputs on calibration text"),
    ("relative_weighted_error", "relative error of the weights, weighed by their Fisher information"),
    ("relative_error", "relative error of the weights"),
)
"""Keys of an error, nearest to the loss first, and what they measure in words."""
WORST = 5


def spectrum_figure(matrices: Sequence[Any]) -> Html | None:
    """Errors over the layers, logarithmic, one line a kind of matrix; None where no error above zero is known."""
    found = records(matrices)
    key, words = measure(found)
    kinds: dict[str, list[tuple[int, float]]] = {}
    for record in found:
        place, error = locate(string(record.get("name"))), _error(record, key)
        if place is not None and error is not None:
            kinds.setdefault(place[1], []).append((place[0], error))
    if not kinds:
        return None
    lines = [Line(name=kind, points=sorted(points)) for kind, points in kinds.items()]
    told = [
        f"{kind} {general(min(errors), 2)} to {general(max(errors), 2)}"
        for kind, points in kinds.items()
        if (errors := [error for _, error in points])
    ]
    return figure(
        log_chart(
            lines,
            alt=f"Error spectrum, {words}, by layer for each kind of matrix: {'; '.join(told)}.",
            x_title="layer",
            y_title=f"{words}, logarithmic",
            x_label=lambda layer: f"{layer:g}" if layer == int(layer) else "",
        ),
        f"Error spectrum: {words} (0: exact, 1: as large as what it replaces), layer by layer.",
        name="Error spectrum",
    )


def worst_table(matrices: Sequence[Any]) -> Html | None:
    """The matrices with the largest errors."""
    found = records(matrices)
    key, words = measure(found)
    errors = [(error, record) for record in found if (error := _error(record, key)) is not None]
    if not errors:
        return None
    errors.sort(key=lambda pair: -pair[0])
    rows = [
        (
            _short(string(record.get("name"))),
            string(record.get("bits")),
            string(record.get("rank")),
            fixed(at(record, "bits_per_weight")),
            general(error, 3),
        )
        for error, record in errors[:WORST]
    ]
    head = ("Matrix", "Bits", "Rank", "Bits per weight", "Error")
    return table(head, rows, caption=f"Largest {words}")


def measure(matrices: Sequence[Record]) -> tuple[str, str]:
    """Key and words of the error that most matrices have; of equals the one nearest to the loss."""
    counts = {key: sum(_error(record, key) is not None for record in matrices) for key, _ in MEASURES}
    most = max(counts.values(), default=0)
    return next((key, words) for key, words in MEASURES if counts[key] == most)


def _short(name: str) -> str:
    """Layer and kind of a decoder matrix; the whole name of any other."""
    place = locate(name)
    return f"layer {place[0]}, {place[1]}" if place is not None else name


def _error(record: Record, key: str) -> float | None:
    value = number(record.get(key))
    return value if value is not None and 1 / MOST < value < MOST else None
