"""Several runs: what the table says of each, what is drawn together, and what is kept apart."""

from __future__ import annotations

from typing import Any

import pytest

from compress.report.compare import Run, comparison
from compress.report.page import render
from tests.unit.report.reading import drawing, elements, middles, parts, section, table_rows, text
from tests.unit.report.samples import PROTOCOL, sample_others, sample_run


def compared(**changes: Any) -> str:
    run = sample_run(layers=2, steps=5) | {"name": "half", "others": sample_others()}
    return render(run | changes)


def rows(page: str) -> dict[str, dict[str, str]]:
    head, *body = table_rows(parts(section(page, "runs"), "table")[0])
    return {line[0]: dict(zip(head, line, strict=True)) for line in body}


def test_the_table_has_every_run_with_its_own_numbers() -> None:
    found = rows(compared())
    assert list(found) == ["half", "two-bits", "mild"]
    half, tight, mild = found.values()
    assert half["Weights"] == "75.1 MB"
    assert half["Smaller by"] == "3.58×"  # 269,030,016 over 75,102,208
    assert (half["Bits per linear weight"], half["Parameters removed"]) == ("2.75", "49.9 %")
    assert half["Perplexity, original"] == "29.19 ± 0.36"
    assert half["Perplexity, small model"] == "55.27 ± 0.68"
    assert half["Perplexity, full + recovered"] == "28.02 ± 0.34"
    assert half["Stages"] == "prune → quantize → train → recover → eval"
    assert (tight["Smaller by"], tight["Bits per linear weight"]) == ("4.41×", "2.00")
    assert tight["Perplexity, small model"] == "77.38 ± 0.95"
    assert mild["Parameters removed"] == "25.0 %"
    # Without an evaluation, what its last stage with a model measured.
    assert (mild["Perplexity, original"], mild["Perplexity, small model"]) == ("—", "74.50")


def test_all_runs_are_on_one_chart() -> None:
    found = drawing(compared(), "Perplexity against the size of the weight files, by run")
    groups = [g for g in parts(found, "g") if "line" in (g.get("class") or "").split()]
    assert [len(middles(g)) for g in groups] == [5, 5, 1]
    notes = [[text(e) for e in parts(g, "title")] for g in groups]
    assert "half, quantized: 75.1 MB, 74.51" in notes[0]
    assert "two-bits, small + adapter: 61 MB, 77.38" in notes[1]
    assert all(e.get("class") in ("mk", "sample") for g in groups for e in parts(g, "path"))  # not joined


def test_curves_over_what_the_runs_differ_in() -> None:
    page = compared()
    bits = drawing(page, "Perplexity of each run's small model against stored bits per linear weight")
    assert "two-bits 77.38 at 2.00; half 55.27 at 2.75; mild 74.50 at 2.75" in str(bits.get("aria-label"))
    (line,) = [g for g in parts(bits, "g") if "line" in (g.get("class") or "")]
    assert len(middles(line)) == 3
    joined = [e for e in parts(line, "path") if e.get("class") is None]
    assert joined == []  # two runs at the same bits are no curve
    written = [text(e) for e in parts(bits, "text")]
    assert {"half", "mild", "two-bits"} <= set(written)
    two = compared(others=sample_others()[:1])
    bits = drawing(two, "Perplexity of each run's small model against stored bits per linear weight")
    assert len([e for e in parts(bits, "path") if e.get("class") is None]) == 1
    # The same share removed in both: nothing to draw over it.
    assert not [e for e in elements(two, "svg") if "linear parameters removed:" in str(e.get("aria-label"))]


def test_other_protocols_are_marked_and_never_share_a_chart() -> None:
    others = sample_others()
    others[0]["stages"][-1]["metrics"]["protocol_line"] = "another <text>"
    page = compared(others=others)
    found = rows(page)
    assert found["half"]["Perplexity, original"] == "29.19 ± 0.36 a"
    assert found["two-bits"]["Perplexity, original"] == "29.19 ± 0.36 b"
    told = text(section(page, "runs"))
    assert f"a {PROTOCOL} b another <text>".replace(" ", "") in told.replace(" ", "")
    charts = [
        str(e.get("aria-label"))
        for e in elements(page, "svg")
        if str(e.get("aria-label")).startswith("Perplexity against the size of the weight files, by run")
    ]
    assert ["two-bits" in words for words in charts] == [False, True]


@pytest.mark.parametrize("others", [None, [], "x", [3, None]])
def test_one_run_is_no_comparison(others: Any) -> None:
    assert not [e for e in elements(compared(others=others), "section") if e.get("id") == "runs"]


def test_runs_without_anything_are_rows_of_dashes() -> None:
    page = compared(others=[{}, {"name": "<b>", "stages": [{"verb": "prune", "metrics": {"after": 3}}]}])
    assert set(list(rows(page)["—"].values())[1:]) == {"—"}
    assert rows(page)["<b>"]["Stages"] == "prune"
    assert comparison([Run(name="a", stages=[])]) is None
    nothing = comparison([Run(name="a", stages=[]), Run(name="b", stages=[])])
    assert nothing is not None
    assert "<svg" not in nothing
