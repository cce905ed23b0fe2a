"""An evaluation on the terminal: several tables of few columns instead of one that is too wide."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from compress.pipelines.reporter import Reporter, human_bytes, human_count

BLANK = "-"
Rows = Sequence[Mapping[str, Any]]


def show(reporter: Reporter, metrics: Mapping[str, Any]) -> None:
    """Print the tables of an evaluation with its protocol and notes; blank where something was not measured."""
    rows: Rows = metrics["rows"]
    _quality(reporter, rows)
    _distance(reporter, rows, metrics.get("reference"))
    _tasks(reporter, rows)
    _harness(reporter, rows)
    _size(reporter, rows)
    _speed(reporter, rows)
    lines = [row.get("protocol_line", metrics["protocol_line"]) for row in rows]
    for line in dict.fromkeys(lines):
        names = [row["name"] for row, its in zip(rows, lines, strict=True) if its == line]
        whose = "" if len(names) == len(rows) else f" of {', '.join(names)}"
        reporter.out.print(f"perplexity{whose}: {line}", markup=False)
    for task in _task_lines(rows):
        reporter.out.print(f"task: {task}", markup=False)
    for note in metrics.get("notes", ()):
        reporter.out.print(f"note: {note}", markup=False)


def _quality(reporter: Reporter, rows: Rows) -> None:
    held = any(row.get("held_out_loss") is not None for row in rows)
    reporter.table(
        "quality (perplexity per token and its 95 % interval, per word"
        + ("; held-out loss)" if held else ")"),
        ("model", "perplexity", "interval", "word ppl", "bits/byte", *(("held-out",) if held else ())),
        [
            (
                row["name"],
                _number(row["perplexity"], 2),
                _span(row.get("perplexity_interval"), 2, "–"),
                _number(row.get("word_perplexity"), 2),
                _number(row.get("bits_per_byte"), 4),
                *((_number(row.get("held_out_loss"), 4),) if held else ()),
            )
            for row in rows
        ],
    )


def _distance(reporter: Reporter, rows: Rows, reference: Any) -> None:
    if not any(row.get("divergence") for row in rows):
        return
    found = [(row["name"], row.get("divergence") or {}) for row in rows]
    reporter.table(
        f"distance from {reference} (KL in nats per token)",
        ("model", "KL", "95 % interval", "same top token", "tokens"),
        [
            (
                name,
                _number(each.get("kl"), 4),
                _span(each.get("kl_interval"), 4),
                _share(each.get("agreement"), each.get("agreement_standard_error")),
                str(each.get("tokens", BLANK)),
            )
            for name, each in found
        ],
    )


def _tasks(reporter: Reporter, rows: Rows) -> None:
    names = list(dict.fromkeys(score["task"] for row in rows for score in row.get("tasks", ())))
    for name in names:
        scores: list[tuple[str, Mapping[str, Any]]] = [
            (row["name"], next((s for s in row.get("tasks", ()) if s["task"] == name), {})) for row in rows
        ]
        choices = scores[0][1].get("kind") == "choices"
        header = ("accuracy", "per byte") if choices else ("accuracy (greedy)", "perplexity")
        reporter.table(
            f"{name}, {scores[0][1].get('rows')} rows (± standard error)",
            ("model", *header),
            [
                (
                    model,
                    _share(score.get("accuracy"), score.get("accuracy_error")),
                    _share(score.get("accuracy_norm"), score.get("accuracy_norm_error"))
                    if choices
                    else _number(score.get("perplexity"), 2),
                )
                for model, score in scores
            ],
        )


def _harness(reporter: Reporter, rows: Rows) -> None:
    found = [
        (
            each["task"],
            each["metric"],
            row["name"],
            _number(each["value"], 4)
            + (f" ± {each['standard_error']:.4f}" if each["standard_error"] is not None else ""),
        )
        for row in rows
        for each in row.get("lm_eval", ())
    ]
    if found:
        found.sort(key=lambda line: line[:2])  # the models of one metric below each other, in their order
        reporter.table("lm-eval", ("task", "metric", "model", "value"), found)


def _size(reporter: Reporter, rows: Rows) -> None:
    on_device = any(row.get("peak_memory_of") == "device" for row in rows)
    reporter.table(
        "size and memory" + (" (peak of the GPU)" if on_device else " (peak of the host)"),
        ("model", "parameters", "file", "bits/param", "resident", "peak"),
        [
            (
                row["name"],
                human_count(row["parameters"]),
                human_bytes(row["bytes"]),
                f"{row['bits_per_weight']:.2f}",
                BLANK if row.get("resident_bytes") is None else human_bytes(row["resident_bytes"]),
                human_bytes(row["peak_memory_bytes"]),
            )
            for row in rows
        ],
    )


def _speed(reporter: Reporter, rows: Rows) -> None:
    if not any(row.get("tokens_per_second") is not None for row in rows):
        return
    full = any(row.get("saturation") for row in rows)
    reporter.table(
        "speed (tokens per second)",
        ("model", "prefill", "decode", *(("saturated", "at batch", "stopped by") if full else ())),
        [
            (
                row["name"],
                _number(row.get("tokens_per_second"), 0),
                _number(row.get("decode_tokens_per_second"), 1),
                *(_saturation(row.get("saturation") or {}) if full else ()),
            )
            for row in rows
        ],
    )


def _saturation(found: Mapping[str, Any]) -> tuple[str, str, str]:
    return (
        _number(found.get("tokens_per_second"), 1),
        str(found.get("batch", BLANK)),
        str(found.get("stopped_by", BLANK)),
    )


def _task_lines(rows: Rows) -> list[str]:
    lines = {score["protocol_line"]: None for row in rows for score in row.get("tasks", ())}
    cut = [
        f"{score['task']}: {score['truncated']} contexts of {row['name']} lost their start to fit its positions"
        for row in rows
        for score in row.get("tasks", ())
        if score["truncated"]
    ]
    return [*lines, *cut]


def _number(value: Any, digits: int) -> str:
    if value is None:
        return BLANK
    return f"{value:.{digits}f}" if abs(value) < 1e6 else f"{value:.2e}"


def _span(interval: Any, digits: int, between: str = " to ") -> str:
    return BLANK if not interval else between.join(_number(end, digits) for end in interval)


def _share(value: Any, error: Any) -> str:
    if value is None:
        return BLANK
    return f"{100 * value:.1f} %" + ("" if error is None else f" ± {100 * error:.1f}")
