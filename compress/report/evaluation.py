"""The table of all measured models, on one protocol."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from compress.report.html import Child, Html, h
from compress.report.stages import perplexity
from compress.report.table import table
from compress.report.values import DASH, Record, at, count, fixed, number, records, size, string

_COLUMNS: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
    ("parameters", "Parameters", count),
    ("bytes", "Bytes", size),
    ("bits_per_weight", "Bits per parameter", fixed),
    ("perplexity", "Perplexity", fixed),
    ("held_out_loss", "Held-out loss", lambda value: fixed(value, 3)),
    ("tokens_per_second", "Tokens/s", lambda value: fixed(value, 0)),
    ("decode_tokens_per_second", "Decoded tokens/s", lambda value: fixed(value, 1)),
    ("peak_memory_bytes", "Peak memory", size),
)
_OPTIONAL = frozenset({"held_out_loss", "decode_tokens_per_second"})
_BARS = frozenset({"bytes", "perplexity"})


def last_evaluation(stages: Sequence[Record]) -> Record | None:
    """Metrics of the last ``eval`` stage."""
    found = [stage for stage in stages if stage.get("verb") == "eval"]
    metrics = found[-1].get("metrics") if found else None
    return metrics if isinstance(metrics, dict) else None


def evaluation(stages: Sequence[Record]) -> Html | None:
    """The table of the last ``eval`` stage with its protocol line; None when there is none."""
    metrics = last_evaluation(stages)
    if metrics is None:
        return None
    rows = records(at(metrics, "rows"))
    columns = [
        (key, title, write)
        for key, title, write in _COLUMNS
        if key not in _OPTIONAL or any(row.get(key) is not None for row in rows)
    ]
    largest = {key: max((number(row.get(key)) or 0.0 for row in rows), default=0.0) for key in _BARS}
    body: list[list[Child]] = [
        [string(row.get("name")), *(_cell(row, key, write, largest) for key, _, write in columns)]
        for row in rows
    ]
    line = at(metrics, "protocol_line")
    return h(
        "section",
        h("h2", "Measured"),
        table(["Model", *(title for _, title, _ in columns)], body),
        h("p", f"Perplexity (lower is better, ± standard error): {string(line)}.", class_="note"),
        id="evaluation",
    )


def _cell(row: Record, key: str, write: Callable[[Any], str], largest: dict[str, float]) -> Child:
    shown = perplexity(row) if key == "perplexity" else write(row.get(key))
    value = number(row.get(key))
    if key not in _BARS or value is None or shown == DASH or largest[key] <= 0:
        return shown
    share = 100 * max(value, 0.0) / largest[key]
    return [shown, h("span", class_="bar", style=f"width:{share:.1f}%", aria_hidden="true")]
