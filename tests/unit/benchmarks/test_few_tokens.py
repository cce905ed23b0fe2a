"""The benchmark of kernels for few tokens: every tile has its block; its reference holds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch

from compress.benchmarks import few_tokens
from compress.benchmarks.few_tokens import CHECKS, TIMES, instances, main, report, summary
from compress.benchmarks.few_tokens_variants import (
    VARIANTS,
    Call,
    Operands,
    Sizes,
    Variant,
    caller,
    kernel_of,
    operands,
)
from compress.benchmarks.protocol import Rows
from compress.kernels.cuda import early, product, streamed
from compress.kernels.cuda.streamed import plan
from compress.kernels.native_product import dequantize
from compress.quantize.native_form import geometry


@pytest.mark.parametrize("processors", [1, 7, 132])
def test_every_tile_has_one_block(processors: int) -> None:
    for sizes in (*CHECKS, *TIMES):
        g = geometry((sizes.rows, sizes.columns), sizes.config)
        found = plan(g, sizes.tokens, sizes.rank, processors)
        assert 1 <= found.blocks <= processors
        more = g.tiles - found.each * found.blocks  # so many blocks, the last, have one more
        assert 0 <= more < found.blocks
        at_once = int(found.instance.split(", ")[3])
        assert at_once >= 4 or found.each + (more > 0) <= at_once


@pytest.mark.parametrize("name", ["package", "older"])
def test_kernels_are_those_that_the_package_launches(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str]] = []
    for module in (product, streamed):
        monkeypatch.setattr(
            module, "kernel", lambda index, file, instance, shared: asked.append((file, instance))
        )
        monkeypatch.setattr(module, "counters", lambda index: nullcontext(1))
    monkeypatch.setattr(product, "launch", lambda *_, **__: None)
    monkeypatch.setattr(streamed, "launch_early", lambda *_, **__: None)
    monkeypatch.setattr(product, "_index", lambda x: 0)
    found = {"major": 9, "shared_memory_per_block_optin": early.SHARED, "multi_processor_count": 132}
    properties: Any = type("Properties", (), found)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    early._able.cache_clear()
    for sizes in CHECKS[-6:-2]:
        of = operands(sizes, torch.device("cpu"), 0)
        caller(VARIANTS[name], of)()
        assert asked[-1] == kernel_of(VARIANTS[name], of.matrix.geometry, sizes.tokens, sizes.rank, 132)
    early._able.cache_clear()
    assert set(asked) <= set(instances([name], TIMES, 132))
    assert {file for file, _ in asked} == (
        {"few_tokens.cu"} if name == "older" else {"few_tokens.cu", "streamed.cu"}
    )


@pytest.mark.parametrize(
    "sizes",
    [
        Sizes(rows=50, columns=104, bits=3, tokens=2, rank=4, scale_bits=3, block=32, group=8),
        Sizes(rows=38, columns=96, bits=4, tokens=1),
    ],
)
def test_the_reference_is_the_matrix_that_kernels_get(sizes: Sizes) -> None:
    of = operands(sizes, torch.device("cpu"), 1)
    weights = of.weights()
    assert weights.shape == (sizes.rows, sizes.columns)
    assert torch.equal(dequantize(of.matrix).double(), weights)
    other = of.copied()
    assert torch.equal(other.matrix.codes, of.matrix.codes)
    assert other.matrix.codes.data_ptr() != of.matrix.codes.data_ptr()
    assert (of.factors is None) == (other.factors is None) == (sizes.rank == 0)


class Replayed:
    """A graph that a CPU replays."""

    def __init__(self, calls: Sequence[Call], results: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        self.calls, self.results = calls, results

    def replay(self) -> None:
        for call, result in zip(self.calls, self.results, strict=True):
            for kept, new in zip(result, call(), strict=True):
                kept.copy_(new)


def on_a_cpu(monkeypatch: pytest.MonkeyPatch, change: Callable[[torch.Tensor, int], torch.Tensor]) -> None:
    """Kernels are float64 products whose results ``change`` may spoil; it is told which call it is."""
    counted = count()

    def caller(variant: Variant, of: Operands, *, waits: bool = False) -> Call:
        def call() -> tuple[torch.Tensor, torch.Tensor]:
            x, weights = of.x.double(), of.weights()
            inner = x @ of.factors[1].double().T if of.factors else x[:, :0]
            exact = x @ weights.T + (inner @ of.factors[0].double() if of.factors else 0.0)
            return change(exact, next(counted)).bfloat16(), inner.float()

        return call

    def captured(calls: Sequence[Call]) -> tuple[Replayed, list[tuple[torch.Tensor, torch.Tensor]]]:
        results = [call() for call in calls]
        return Replayed(calls, results), results

    monkeypatch.setattr(few_tokens, "caller", caller)
    monkeypatch.setattr(few_tokens, "captured", captured)
    monkeypatch.setattr(
        few_tokens, "operands", lambda sizes, _, seed: operands(sizes, torch.device("cpu"), seed)
    )
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)


SMALL = (Sizes(rows=38, columns=96, bits=4, tokens=2, rank=8), Sizes(rows=32, columns=128, bits=3, tokens=1))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda y, n: y, None),
        (lambda y, n: y + 0.1 * (torch.arange(y.shape[1]) == 3), "outside"),
        (lambda y, n: y if n != 8 else y * 1.02, "repeats"),
        (lambda y, n: y if n < 42 or n % 4 else y * 1.02, "repeats_in_graph"),
    ],
)
def test_a_check_finds_what_is_wrong(
    change: Callable[[torch.Tensor, int], torch.Tensor], problem: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_a_cpu(monkeypatch, change)
    monkeypatch.setattr(few_tokens, "CHECKS", SMALL[:1])
    row = few_tokens.check("waiting")
    assert row["largest_error"] < 2**-8 or problem == "outside"
    assert (row["passed"], len(row["failed"])) == ((1, 0) if problem is None else (0, 1))
    for found in row["failed"].values():
        wrong = {"outside": found["outside"] > 0}
        wrong |= {key: not found[key] for key in ("repeats", "repeats_in_graph")}
        assert [key for key, is_so in wrong.items() if is_so] == [problem]


def test_what_fails_is_not_timed_and_what_is_late_is_listed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from compress.benchmarks import kernels_gpu_clock

    on_a_cpu(monkeypatch, lambda y, n: y)
    monkeypatch.setattr(few_tokens, "queued_seconds", lambda graph, *, busy: 4e-6)
    monkeypatch.setattr(few_tokens, "LAYER", ((32, 128), (64, 128)))
    monkeypatch.setattr(few_tokens, "ROTATED", 1 << 14)
    monkeypatch.setattr(kernels_gpu_clock, "ceilings", lambda device: {"bytes_per_second": 1e10})
    fine = {"products": 1, "passed": 1, "largest_error": 0.0, "failed": {}}
    lost = fine | {"passed": 0, "failed": {"all": {"problem": "lost"}}}
    monkeypatch.setattr(few_tokens, "check_apart", lambda name: fine if name == "package" else lost)
    rows, names = Rows(tmp_path / "rows.json", {"benchmark": "test"}), ["package", "older"]
    assert few_tokens.benchmark(rows, names, SMALL, checks=True, seconds=-1) == [
        *map(str, SMALL),
        "layer, rank 0",
        "layer, rank 64",
    ]
    assert few_tokens.benchmark(rows, names, SMALL, checks=True, seconds=60) == []
    row = rows.get(str(SMALL[1]))
    assert set(row["contestants"]) == {"package"}
    copies = 1 + (1 << 14) // operands(SMALL[1], torch.device("cpu"), 0).nbytes
    assert row["contestants"]["package"]["alone_seconds"] == pytest.approx(4e-6 / copies)
    assert row["contestants"]["package"]["share_of_floor"] == pytest.approx(
        row["moved_bytes"] / 1e10 / (4e-6 / copies)
    )
    assert rows.get("layer, rank 64")["contestants"]["package"]["queued_seconds"] == pytest.approx(2e-6)


def test_figures_and_failures_are_reported() -> None:
    ways = {"queued": [4e-6, 2e-6, 3e-6], "alone": [5e-6, 5e-6, 6e-6]}
    found = summary(ways, 1.5e-6)
    assert found["share_of_floor"] == 0.5
    assert (found["queued_least_seconds"], found["queued_most_seconds"]) == (2e-6, 4e-6)
    failed = {"products": 2, "passed": 1, "largest_error": 0.5, "failed": {"4 x 4": {"problem": "lost"}}}
    case = {"floor_seconds": 1.5e-6, "contestants": {"older": found}}
    said = report({"checks, older": failed, "case": case}, ["layer, rank 0"])
    for words in ("1 of 2", "4 x 4: {'problem': 'lost'}", "3.00 us (50% of the floor)", "layer, rank 0"):
        assert words in said


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_without_a_gpu_it_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([]) == 2
    assert "needs a CUDA device" in capsys.readouterr().err
    monkeypatch.setattr(few_tokens, "nvrtc", lambda: None)
    assert main(["--build"]) == 2
    assert "NVRTC" in capsys.readouterr().err
