from __future__ import annotations

from pathlib import Path

import pytest

from compress.benchmarks.protocol import Rows
from compress.benchmarks.quantization_rows import PARTS
from compress.benchmarks.quantize_speed import PEER, RUNS, measure, medians, report
from tests.unit.benchmarks.test_protocol import needs_wikitext
from tests.unit.benchmarks.test_quantization import tiny_bench


@needs_wikitext
@pytest.mark.usefixtures("forked_reopen")
def test_runs_are_timed_by_part_and_made_once(tmp_path: Path) -> None:
    bench = tiny_bench(tmp_path)
    bench.work.mkdir()
    rows = Rows(tmp_path / "rows.json", {"benchmark": "test"})
    measure(bench, rows, 1)
    assert set(rows.rows) == {f"{name}, 0" for name in RUNS}
    assert "no environment" in rows.get(f"{PEER}, 0")["not_run"]
    found = medians(rows.rows)
    assert set(found) == {"hessian", "frobenius"}
    assert set(found["hessian"]["parts"]) == {*PARTS, "solve"} - {"exact errors"}
    for run in found.values():
        assert run["seconds"] == pytest.approx(sum(run["parts"].values()))
        assert run["verb"] >= run["seconds"]
    before = rows.get("hessian, 0")
    measure(bench, rows, 1)
    assert rows.get("hessian, 0") == before
    assert not list(bench.work.iterdir())


def test_ratios_are_those_of_the_medians() -> None:
    def row(seconds: float) -> dict[str, object]:
        return {"seconds": seconds, "load_before": 0.5}

    ours = {f"hessian, {turn}": row(seconds) for turn, seconds in enumerate((10.0, 90.0, 20.0))}
    text = report(medians({**ours, f"{PEER}, 0": row(70.0)}))
    assert f"hessian: 3.50x as fast as {PEER}, goal 3x" in text
    assert f"not measured: frobenius against {PEER}" in text
