"""What the last evaluation measured: quality and distance from the original, tasks, speed and memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from compress.report.html import Child, Html, h
from compress.report.stages import perplexity
from compress.report.table import table
from compress.report.values import (
    DASH,
    Record,
    at,
    count,
    fixed,
    number,
    numbers,
    percent,
    records,
    sequence,
    size,
    string,
)

Columns = tuple[tuple[str, Callable[[Record], str]], ...]


def _of(*path: str, write: Callable[[Any], str]) -> Callable[[Record], str]:
    return lambda row: write(at(row, *path))


def _perplexity(row: Record) -> str:
    """With its 95 % interval; records from before there was one have a standard error."""
    interval = numbers(row.get("perplexity_interval"))
    value = number(row.get("perplexity"))
    if value is None or len(interval) != 2:
        return perplexity(row)
    return f"{fixed(value)} ({fixed(interval[0])} to {fixed(interval[1])})"


def _share(row: Record, *path: str, error: str) -> str:
    value, spread = at(row, *path), number(at(row, *path[:-1], error))
    return percent(value) if spread is None else f"{percent(value)} ± {fixed(100 * spread, 1)}"


_QUALITY: Columns = (
    ("Parameters", _of("parameters", write=count)),
    ("Bytes", _of("bytes", write=size)),
    ("Bits per parameter", _of("bits_per_weight", write=fixed)),
    ("Perplexity", _perplexity),
    ("Word-level perplexity", _of("word_perplexity", write=fixed)),
    ("Bits per byte", _of("bits_per_byte", write=lambda value: fixed(value, 4))),
    ("Held-out loss", _of("held_out_loss", write=lambda value: fixed(value, 3))),
)
_DISTANCE: Columns = (
    ("KL divergence", _of("divergence", "kl", write=lambda value: fixed(value, 4))),
    ("95 % interval", lambda row: _interval(at(row, "divergence", "kl_interval"))),
    (
        "Same most likely token",
        lambda row: _share(row, "divergence", "agreement", error="agreement_standard_error"),
    ),
    ("Tokens compared", _of("divergence", "tokens", write=count)),
)
_SPEED: Columns = (
    ("Tokens/s", _of("tokens_per_second", write=lambda value: fixed(value, 0))),
    ("Decoded tokens/s", _of("decode_tokens_per_second", write=lambda value: fixed(value, 1))),
    (
        "Decoded tokens/s, saturated",
        _of("saturation", "tokens_per_second", write=lambda value: fixed(value, 1)),
    ),
    ("at batch", _of("saturation", "batch", write=lambda value: fixed(value, 0))),
    ("Resident", _of("resident_bytes", write=size)),
    ("Peak memory", _of("peak_memory_bytes", write=size)),
    ("of the", lambda row: {"device": "GPU", "host": "host"}.get(string(row.get("peak_memory_of")), "")),
)
_ALWAYS = frozenset({"Parameters", "Bytes", "Bits per parameter", "Perplexity", "Tokens/s", "Peak memory"})
"""Columns that stay where no model has a value: without them a table would not be one."""

_BARS = {"Bytes": "bytes", "Perplexity": "perplexity"}


def last_evaluation(stages: Sequence[Record]) -> Record | None:
    """Metrics of the last ``eval`` stage."""
    found = [stage for stage in stages if stage.get("verb") == "eval"]
    metrics = found[-1].get("metrics") if found else None
    return metrics if isinstance(metrics, dict) else None


def evaluation(stages: Sequence[Record]) -> Html | None:
    """The tables of the last ``eval`` stage with its protocol line and notes; None when there is none."""
    metrics = last_evaluation(stages)
    if metrics is None:
        return None
    rows = records(at(metrics, "rows"))
    interval = any(len(numbers(row.get("perplexity_interval"))) == 2 for row in rows)
    spread = "with its 95 % interval over windows" if interval else "± standard error"
    line = string(at(metrics, "protocol_line"))
    notes = [string(note) for note in sequence(at(metrics, "notes")) if note]
    return h(
        "section",
        h("h2", "Measured"),
        _table(_QUALITY, rows),
        h("p", f"Perplexity (per token, lower is better, {spread}): {line}.", class_="note"),
        [h("p", note, class_="note") for note in notes],
        _distance(rows, metrics),
        _tasks(rows),
        _harness(rows),
        h("h3", "Speed and memory"),
        _table(_SPEED, rows),
        id="evaluation",
    )


def _distance(rows: Sequence[Record], metrics: Record) -> list[Child]:
    compared = [row for row in rows if isinstance(row.get("divergence"), dict)]
    if not compared:
        return []
    reference = string(at(metrics, "reference"))
    return [
        h("h3", f"Distance from {reference}"),
        _table(_DISTANCE, compared),
        h(
            "p",
            f"KL divergence of the predictions from those of {reference}, in nats per token, over the first windows "
            "of the same text; 0 is the same model.",
            class_="note",
        ),
    ]


def _tasks(rows: Sequence[Record]) -> list[Child]:
    scored = [(string(row.get("name")), score) for row in rows for score in records(row.get("tasks"))]
    shown: list[Child] = []
    for name in dict.fromkeys(string(score.get("task")) for _, score in scored):
        found = [(model, score) for model, score in scored if string(score.get("task")) == name]
        choices = found[0][1].get("kind") == "choices"
        body = [
            (
                model,
                _share(score, "accuracy", error="accuracy_error"),
                _share(score, "accuracy_norm", error="accuracy_norm_error")
                if choices
                else fixed(score.get("perplexity")),
            )
            for model, score in found
        ]
        head = ("Accuracy", "Accuracy per byte") if choices else ("Accuracy (greedy)", "Perplexity")
        shown += [
            h("h3", f"Task {name}"),
            table(("Model", *head), body),
            h("p", f"± standard error over rows: {string(found[0][1].get('protocol_line'))}.", class_="note"),
        ]
    return shown


def _harness(rows: Sequence[Record]) -> list[Child]:
    body = [
        (
            string(each.get("task")),
            string(each.get("metric")),
            string(row.get("name")),
            fixed(each.get("value"), 4),
            fixed(each.get("standard_error"), 4),
        )
        for row in rows
        for each in records(row.get("lm_eval"))
    ]
    if not body:
        return []
    body.sort(key=lambda line: line[:2])
    return [
        h("h3", "Tasks of lm-eval"),
        table(("Task", "Metric", "Model", "Value", "± standard error"), body),
    ]


def _table(columns: Columns, rows: Sequence[Record]) -> Html:
    """One line a model; a column that no model has a value for is left out."""
    shown = [
        (title, write)
        for title, write in columns
        if title in _ALWAYS or any(write(row) != DASH for row in rows)
    ]
    largest = {key: max((number(row.get(key)) or 0.0 for row in rows), default=0.0) for key in _BARS.values()}
    body: list[list[Child]] = [
        [string(row.get("name")), *(_cell(row, title, write(row), largest) for title, write in shown)]
        for row in rows
    ]
    return table(["Model", *(title for title, _ in shown)], body)


def _cell(row: Record, title: str, text: str, largest: dict[str, float]) -> Child:
    key = _BARS.get(title, "")
    value = number(row.get(key))
    if not key or value is None or text == DASH or largest[key] <= 0:
        return text
    share = 100 * max(value, 0.0) / largest[key]
    return [text, h("span", class_="bar", style=f"width:{share:.1f}%", aria_hidden="true")]


def _interval(value: Any) -> str:
    ends = numbers(value)
    return f"{fixed(ends[0], 4)} to {fixed(ends[1], 4)}" if len(ends) == 2 else DASH
