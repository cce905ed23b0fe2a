"""Pictures of the records for the documentation, drawn by the charts of the report."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from compress.pipelines.workspace import read_json
from compress.report.charts import Line, log_chart
from compress.report.damage_curve import damage_charts
from compress.report.html import Html
from compress.report.svg import svg_file

IMAGES = Path("docs", "images")
_BITS = re.compile(r" [0-9]+(?:\.[0-9]+)?")
_ABLATIONS = ("hessian, ", "frobenius, ")


def pruning_curve(rows: Mapping[str, Any]) -> Html:
    """Perplexity against the share removed, a line a criterion; of a record with one protocol."""
    ((_, drawing),) = damage_charts(rows)
    return drawing


def quantization_curve(rows: Mapping[str, Any]) -> Html:
    """Perplexity against stored bits per quantized weight, a line a tool; trained rows and ablations are left out."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for name, row in rows.items():
        if "not_run" in row or name == "dense" or name.endswith("trained") or name.startswith(_ABLATIONS):
            continue
        point = (row["bits_per_weight"], row["perplexity"])
        lines.setdefault(_BITS.sub("", name, count=1), []).append(point)
    drawn = [Line(name=name, points=sorted(points)) for name, points in lines.items()]
    told = "; ".join(
        f"{line.name} {', '.join(f'{y:.4g} at {x:.3g} bits' for x, y in line.points)}" for line in drawn
    )
    return log_chart(
        drawn,
        mark=("not quantized", rows["dense"]["perplexity"]) if "dense" in rows else None,
        alt=f"Perplexity against stored bits per quantized weight, by tool: {told}.",
        x_title="stored bits per quantized weight",
        y_title="perplexity, logarithmic",
        x_label=lambda value: f"{value:g}",
    )


PICTURES: dict[str, tuple[str, Callable[[Mapping[str, Any]], Html]]] = {
    "pruning-curve.svg": ("pruning-curve-cpu.json", pruning_curve),
    "quantization-table.svg": ("quantization-table-cpu.json", quantization_curve),
}
"""File name -> the record that it shows, and how its rows are drawn."""


def pictures(records: Path) -> dict[str, str]:
    """Text of every picture whose record is there, by file name.

    Raises:
        CompressError: A record cannot be read.
    """
    style = (files("compress.report") / "style.css").read_text("utf-8")
    return {
        name: svg_file(draw(read_json(records / record)["rows"]), style)
        for name, (record, draw) in PICTURES.items()
        if (records / record).is_file()
    }
