"""The benchmark of the GPU kernels: it runs to its end in the interpreter, and its figures follow from the times."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from compress.benchmarks import kernels_gpu, kernels_gpu_merge
from compress.benchmarks.kernels_cpu_cases import Contestant
from compress.benchmarks.kernels_gpu import floor, report, with_floors
from compress.benchmarks.protocol import Rows
from compress.errors import CompressError
from compress.kernels import gpu
from compress.kernels.triton.launch import runs_on

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")

pytestmark = pytest.mark.skipif(not runs_on(DEVICE), reason="triton is not installed")

if runs_on(DEVICE):
    from compress.benchmarks import kernels_gpu_cases as cases
    from compress.benchmarks.kernels_gpu_clock import measured
    from compress.benchmarks.kernels_gpu_table import measured_table
    from compress.kernels.triton import dense
    from compress.kernels.triton.choice import read_table


@pytest.fixture(autouse=True)
def served(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "_cpu", lambda: True)


def test_every_part_runs_and_the_report_has_every_contestant(tmp_path: Path) -> None:
    rows = Rows(tmp_path / "rows.json", {"benchmark": "test"})
    left_out = kernels_gpu.benchmark(
        rows, DEVICE, parts=kernels_gpu.PARTS, seconds=600, quick=True, save=tmp_path / "tables"
    )
    assert left_out == []
    text = report(rows.rows, left_out)
    names = (
        "checks",
        "linear, 48 x 96, 20 tokens",
        "dequantize",
        "backward",
        "group quick",
        "merge, 5 x 48 x 96",
    )
    for name in (*names, "cut, 5 x 48 x 96", "checks of merging", "GB/s to the device"):
        assert name in text
    contestants = rows.get("linear, 48 x 96, 1 tokens")["contestants"]
    assert set(contestants) == {"nf3", "nf3 module", "dense bfloat16"}
    assert set(rows.get("merge, 5 x 48 x 96")["contestants"]) == {"host", "one by one", "batched"}
    assert set(rows.get("cut, 5 x 48 x 96")["contestants"]) == {"host", "batched"}
    (table,) = (tmp_path / "tables").iterdir()
    assert read_table(table).measured
    again = kernels_gpu.benchmark(rows, DEVICE, parts=("linear",), seconds=0, quick=True, save=None)
    assert again == []  # everything is there already


def test_what_time_does_not_allow_is_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = Rows(tmp_path / "rows.json", {"benchmark": "test"})
    rows.put("checks", {"nf4": 0.0})
    rows.put("ceilings", {"bytes_per_second": 1.0, "operations_per_second": 1.0})
    left_out = kernels_gpu.benchmark(rows, DEVICE, parts=("groups",), seconds=-1, quick=True, save=None)
    assert left_out == ["group quick, 1 token"]
    assert "not measured, the time was up: group quick" in report(rows.rows, left_out)


def test_merging_is_left_out_when_the_time_is_up(tmp_path: Path) -> None:
    rows = Rows(tmp_path / "rows.json", {"benchmark": "test"})
    rows.put("checks", {"nf4": 0.0})
    rows.put("ceilings", {"bytes_per_second": 1.0, "operations_per_second": 1.0})
    left_out = kernels_gpu.benchmark(rows, DEVICE, parts=("merge",), seconds=-1, quick=True, save=None)
    assert left_out == ["merge, 5 x 48 x 96", "cut, 5 x 48 x 96"]
    assert rows.get("checks of merging")["merged"] < 2**-8


@pytest.mark.parametrize("which", ["AddProduct", "Recompress"])
def test_a_wrong_merge_ends_the_run(which: str, monkeypatch: pytest.MonkeyPatch) -> None:
    operation = getattr(kernels_gpu_merge, which)
    right = operation.__call__

    def wrong(self: Any, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        found = right(self, *inputs)
        return (found[0] * 1.05, *found[1:])

    monkeypatch.setattr(operation, "__call__", wrong)
    with pytest.raises(CompressError, match=r"in batches differs from float64"):
        kernels_gpu_merge.check_merging(DEVICE, ((24, 40), (40, 24)))


def test_a_wrong_kernel_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    right = dense.dequantize
    monkeypatch.setattr(dense, "dequantize", lambda matrix: right(matrix) + 1e-3)
    with pytest.raises(CompressError, match="NF2 weights differ"):
        cases.check_products(DEVICE, (16, 64), (1,))


def test_floors_are_the_longer_of_bytes_and_operations() -> None:
    ceilings = {"bytes_per_second": 100.0, "operations_per_second": 10.0}
    assert floor(200, 5, ceilings) == 2.0
    assert floor(200, 50, ceilings) == 5.0
    found = with_floors(
        {
            "ours": {"weight_bytes": 200, "eager_seconds": 8.0, "graph_seconds": 4.0},
            "peer": {"failed": "ImportError: no"},
        },
        5,
        ceilings,
    )
    assert found["ours"]["share_of_floor"] == 0.5
    assert found["peer"] == {"failed": "ImportError: no"}
    assert "failed: ImportError: no" in report({"case": {"contestants": found}}, [])


def test_a_peer_that_fails_stops_nobody_and_one_of_ours_does() -> None:
    def broken() -> None:
        raise ValueError("no kernel image")

    fine = Contestant(calls=(lambda: None,), weight_bytes=1)
    bad = Contestant(calls=(broken,), weight_bytes=1)
    found = measured({"nf4": fine, "gemlite int4": bad}, torch.device("cpu"), 1)
    assert found["gemlite int4"] == {"failed": "ValueError: no kernel image"}
    assert found["nf4"]["graph_seconds"] is None
    with pytest.raises(ValueError, match="no kernel image"):
        measured({"nf4": bad}, torch.device("cpu"), 1)


def test_the_fastest_candidate_makes_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    from compress.benchmarks import kernels_gpu_table as module

    def seconds(setting: Any, shape: Any, bits: int, tokens: int, choice: Any, transposed: bool) -> float:
        if isinstance(choice, dense.Slices):
            return 200.0
        return tokens * {16: 3.0, 32: 1.0, 64: 2.0}[choice.rows]

    monkeypatch.setattr(module, "seconds_of", seconds)
    setting = cases.Setting(device=DEVICE, rotated=0)
    candidates = [({"rows": rows, "chunks": 2}, 4) for rows in (16, 32, 64)]
    table = measured_table(
        setting, (64, 64), 4, name="x", deadline=float("inf"), candidates=candidates, widths=(4,)
    )
    tiles = [rule for rule in table["rules"] if "tiles" in rule]
    assert {rule["tiles"]["rows"] for rule in tiles} == {32}
    assert [rule["most_tokens"] for rule in tiles] == [16, 32, 128] * 2


def test_a_candidate_that_does_not_run_is_no_candidate(monkeypatch: pytest.MonkeyPatch) -> None:
    from compress.benchmarks import kernels_gpu_table as module

    def refused(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("out of resource: shared memory")

    monkeypatch.setattr(module.product, "product", refused)
    setting = cases.Setting(device=DEVICE, rotated=0)
    assert module.seconds_of(setting, (64, 64), 4, 1, cases.Tiles(), False) == float("inf")


def test_without_a_gpu_only_the_quick_form_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert kernels_gpu.main([]) == 2
    assert "needs a CUDA device" in capsys.readouterr().err
    called: list[list[str]] = []
    monkeypatch.setattr(kernels_gpu, "interpreted", lambda: False)
    monkeypatch.setattr(kernels_gpu, "in_the_interpreter", lambda given: called.append(list(given)) or 0)
    assert kernels_gpu.main(["--quick", "--part", "linear"]) == 0
    assert called == [["--quick", "--part", "linear"]]


def test_the_quick_form_writes_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if DEVICE.type == "cuda":
        pytest.skip("the interpreter's form")
    assert kernels_gpu.main(["--quick", "--part", "groups", "--out", str(tmp_path / "found.json")]) == 0
    content = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    assert "mean nothing" in content["identity"]["device"]
    assert "one launch" in capsys.readouterr().out
