"""Peak memory by stage against the size of the model, as bars."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from xml.sax.saxutils import escape

_WIDTH, _LEFT, _RIGHT, _ROW, _TOP = 640, 110, 110, 34, 54
_KINDS = (("resident", "#4472a8"), ("anonymous", "#a8c4e0"))


def bar_chart(result: Mapping[str, Any]) -> str:
    """An SVG: a pair of bars for each stage, a tick at its limit, and one bar for the weights on disk.

    Args:
        result: Of `compress.benchmarks.scale`.
    """
    stages, model = result["stages"], float(result["model_bytes"])
    values = [stage["peak"]["resident"] for stage in stages.values()]
    limits = [stage["limit_bytes"] for stage in stages.values()]
    scale = (_WIDTH - _LEFT - _RIGHT) / max([model, *values, *limits])
    height = _TOP + _ROW * (len(stages) + 1) + 30
    alt = f"Peak memory of every stage against a model of {model / 1e9:.1f} GB"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" role="img" '
        f'aria-label="{escape(alt)}" font-family="sans-serif" font-size="12">',
        f"<title>{escape(alt)}</title>",
        f'<rect width="{_WIDTH}" height="{height}" fill="#ffffff"/>',
        f'<text x="{_LEFT}" y="18">Peak memory by stage, {escape(str(result["shape"]))} shape</text>',
    ]
    for place, (kind, colour) in enumerate(_KINDS):
        parts.append(f'<rect x="{_LEFT + 130 * place}" y="28" width="10" height="10" fill="{colour}"/>')
        parts.append(f'<text x="{_LEFT + 14 + 130 * place}" y="37">{kind}</text>')
    parts.append(f'<text x="{_LEFT + 260}" y="37">| limit</text>')
    for row, (name, stage) in enumerate(stages.items()):
        top = _TOP + _ROW * row
        parts.append(f'<text x="{_LEFT - 6}" y="{top + 16}" text-anchor="end">{escape(name)}</text>')
        for place, (kind, colour) in enumerate(_KINDS):
            width = scale * stage["peak"][kind]
            parts.append(
                f'<rect x="{_LEFT}" y="{top + 11 * place}" width="{width:.1f}" height="10" fill="{colour}"/>'
            )
        mark = _LEFT + scale * stage["limit_bytes"]
        parts.append(
            f'<line x1="{mark:.1f}" x2="{mark:.1f}" y1="{top - 3}" y2="{top + 24}" stroke="#000000"/>'
        )
        parts.append(
            f'<text x="{max(mark, _LEFT + scale * stage["peak"]["resident"]) + 5:.1f}" y="{top + 16}">'
            f"{stage['peak']['resident'] / 1e9:.2f} GB</text>"
        )
    top = _TOP + _ROW * len(stages)
    parts.append(f'<text x="{_LEFT - 6}" y="{top + 16}" text-anchor="end">weights on disk</text>')
    parts.append(
        f'<rect x="{_LEFT}" y="{top}" width="{scale * model:.1f}" height="21" fill="#999999"/>'
        f'<text x="{_LEFT + scale * model + 5:.1f}" y="{top + 16}">{model / 1e9:.2f} GB</text>'
    )
    return "\n".join([*parts, "</svg>"]) + "\n"
