from __future__ import annotations

import copy
import io
from typing import Any

import pytest
from rich.console import Console

from compress.pipelines.eval_tables import show
from compress.pipelines.reporter import Reporter
from compress.report.page import render
from tests.unit.report.reading import words
from tests.unit.report.samples import evaluated_run, sample_run


def shown(metrics: dict[str, Any], width: int = 80) -> str:
    reporter = Reporter(quiet=True)
    file = io.StringIO()
    reporter.out = Console(file=file, width=width, highlight=False)
    show(reporter, metrics)
    return file.getvalue()


def test_everything_fits_80_columns() -> None:
    metrics = evaluated_run()["stages"][-1]["metrics"]
    for row in metrics["rows"]:
        for score in row["tasks"]:
            score |= {"rows": 100, "truncated": 0}
    metrics["rows"][1]["tasks"][0]["truncated"] = 7
    told = shown(metrics)
    assert max(map(len, told.splitlines())) <= 80
    flat = " ".join(told.split())
    for expected in (
        "full + recovered │ 28.02 │ 27.27–28.82 │",
        "60.50",
        "0.8765",
        "distance from original",
        "0.1000 to 0.1500",
        "76.5 % ± 1.2",
        "quiz, 100 rows",
        "62.5 % ± 5.0",
        "33.21",
        "0.3125 ± 0.0211",
        "541.0 MB",
        "210.4",
        "throughput",
        "7 contexts of pruned lost their start",
        "note: The tokenizers differ (a; b).",
    ):
        assert expected in flat, expected


def test_records_of_before_are_shown_with_blanks() -> None:
    metrics = sample_run(layers=2, steps=5)["stages"][-1]["metrics"]
    told = shown(metrics)
    assert "29.19" in told
    assert "; held-out loss)" in told
    for absent in ("distance from", "saturated", "lm-eval", "note:"):
        assert absent not in told
    assert " - " in told  # word-level perplexity was not measured then


@pytest.mark.parametrize(("value", "written"), [(999_999.0, "999999.00"), (3.5e12, "3.50e+12")])
def test_a_perplexity_out_of_all_bounds_takes_few_characters(value: float, written: str) -> None:
    metrics = copy.deepcopy(sample_run(layers=2, steps=5)["stages"][-1]["metrics"])
    metrics["rows"][0]["perplexity"] = value
    assert written in shown(metrics)


def test_models_with_protocols_of_their_own_are_named() -> None:
    metrics = evaluated_run()["stages"][-1]["metrics"]
    for row in metrics["rows"]:
        row |= {"tasks": [], "protocol_line": "line one"}
    assert "perplexity: line one" in shown(metrics)
    metrics["rows"][-1]["protocol_line"] = "line two"
    told = " ".join(shown(metrics).split())
    names = [row["name"] for row in metrics["rows"]]
    assert f"perplexity of {', '.join(names[:-1])}: line one" in told
    assert f"perplexity of {names[-1]}: line two" in told


def test_every_measurement_says_how_it_was_made() -> None:
    metrics = evaluated_run()["stages"][-1]["metrics"]
    metrics["held_out_protocol_line"] = "pydoc validation, held out"
    for number, row in enumerate(metrics["rows"]):
        row |= {"speed_protocol_line": "batch 1, timed", "peak_memory_of": "device", "tasks": []}
        row["lm_eval"] = [
            {
                "task": "t",
                "metric": "acc",
                "value": 0.5,
                "standard_error": None,
                "protocol_line": f"t, {number}",
            }
        ]
    told = shown(metrics)
    assert "held-out loss: pydoc validation, held out" in told
    assert told.count("speed: batch 1, timed") == 1
    assert "task: t, 0" in told
    assert "task: t, 1" in told
    assert "size and memory (peak of the GPU)" in told
    page = words(render({"stages": [{"verb": "eval", "metrics": metrics}]}))
    for line in (
        "Held-out loss: pydoc validation, held out.",
        "Speed: batch 1, timed.",
        "Task: t, 0.",
        "Task: t, 1.",
    ):
        assert page.count(line) == 1, line
