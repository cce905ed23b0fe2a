"""The perplexities and sizes in the tables of the pages are those of the records, not of older ones.

A figure is looked for in all records, so one that stands in the wrong row is not noticed; one that a new measurement
has replaced is, unless chance has another figure with the same digits.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.sources import ROOT

PAGES = (
    "README.md",
    "docs/pruning.md",
    *(f"docs/tutorials/{name}.md" for name in ("lq-lora", "loraprune", "loram")),
)
FIGURE = re.compile(r"(?<![\d.])(\d[\d,]*\.(\d{2,3}))(?![\d])")
UNITS = (1, 10**6)
"""As recorded, and in millions: bytes are shown as MB."""


def leaves(value: Any) -> Iterator[float]:
    if isinstance(value, dict):
        for each in value.values():
            yield from leaves(each)
    elif isinstance(value, list):
        for each in value:
            yield from leaves(each)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield float(value)


def recorded(folder: Path) -> list[float]:
    return [
        leaf
        for path in folder.rglob("*.json")
        for leaf in leaves(json.loads(path.read_text(encoding="utf-8")))
    ]


def stale(page: str, values: list[float]) -> list[str]:
    """Figures with two or three decimals in the tables of ``page`` that no record has."""
    known = {f"{value / unit:,.{digits}f}" for value in values for unit in UNITS for digits in (2, 3)}
    rows = [line for line in page.splitlines() if line.startswith("|")]
    return [figure for row in rows for figure, _ in FIGURE.findall(row) if figure not in known]


@pytest.mark.parametrize("page", PAGES)
def test_figures_of_the_tables_are_in_a_record(page: str) -> None:
    assert stale((ROOT / page).read_text(encoding="utf-8"), recorded(ROOT / "benchmarks/results")) == []


def test_an_older_figure_would_be_noticed() -> None:
    page = "| FLAP | 230.96, 381.74 | 162.86 |\n\nNot a table: 55.55.\n"
    assert stale(page, [230.9646, 162_861_696.0]) == ["381.74"]
    assert FIGURE.findall("| 1,045.07 | 3.7 | 1.2345 |") == [("1,045.07", "07")]
