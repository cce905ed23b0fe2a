"""The benchmark of the CPU kernels: contestants compute the same, turns are fair, figures follow from the times."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from compress.benchmarks import kernels_cpu, kernels_cpu_cases
from compress.benchmarks.kernels_cpu import account, benchmark, interleaved, measured, report
from compress.benchmarks.kernels_cpu_cases import (
    Contestant,
    copies,
    dequantize_case,
    linear_case,
    quantize_case,
    training_case,
)
from compress.benchmarks.kernels_cpu_model import _nf3, grown_by, here, replaced, speeds
from compress.benchmarks.protocol import Rows
from compress.kernels.library import library
from compress.quantize.linear import LQLinear
from tests.tiny import tiny_model

pytestmark = pytest.mark.skipif(library() is None, reason="the C library was not built")

SHAPE = (48, 64)


@pytest.fixture(autouse=True)
def few_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels_cpu_cases, "ROTATED", 4000)
    monkeypatch.setattr(kernels_cpu_cases, "RANK", 4)


def first(contestant: Contestant) -> torch.Tensor:
    found = contestant.calls[0]()
    return found[0] if isinstance(found, tuple) else found


def test_copies_are_many_enough_and_apart() -> None:
    case = linear_case(SHAPE, 1, ())
    for contestant in case.values():
        assert len(contestant.calls) * contestant.weight_bytes > 4000
        assert len(contestant.calls) == copies(contestant.weight_bytes)
    held = [call.args[0] for call in case["nf3"].calls]
    assert len({matrix.codes.data_ptr() for matrix in held}) == len(held) > 1


@pytest.mark.parametrize("bits", [4, 3, 2])
def test_both_ways_of_a_width_give_the_same(bits: int) -> None:
    case = linear_case(SHAPE, 1, ())
    one, other = first(case[f"nf{bits}"]), first(case[f"nf{bits}, dequantize + linear"])
    assert one.shape == (1, 48)
    torch.testing.assert_close(one.float(), other.float(), rtol=0.03, atol=0.1)
    assert torch.equal(
        first(dequantize_case(SHAPE, ())["nf4"]), first(dequantize_case(SHAPE, ())["nf4, torch"])
    )


def test_every_call_of_a_case_runs() -> None:
    cases = linear_case(SHAPE, 9, ()), dequantize_case(SHAPE, ()), quantize_case(SHAPE, ())
    for case in (*cases, training_case(SHAPE, 5, ())):
        for contestant in case.values():
            for call in contestant.calls:
                call()


def test_contestants_take_turns_and_their_copies_too() -> None:
    order: list[str] = []

    def named(name: str) -> Contestant:
        calls = tuple(lambda turn=turn: order.append(f"{name}{turn}") for turn in range(2))
        return Contestant(calls=calls, weight_bytes=1)

    seconds = interleaved({"a": named("a"), "b": named("b")}, 3)
    assert order[:4] == ["a0", "a1", "b0", "b1"]  # what a first call does once is not counted
    assert order[4:] == ["a0", "b0", "a1", "b1", "a0", "b0"]
    assert {name: len(found) for name, found in seconds.items()} == {"a": 3, "b": 3}


def test_ratios_are_within_rounds_and_floors_follow_from_the_ceilings(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    times = {"nf4": [1.0, 2.0, 4.0], "peer": [2.0, 6.0, 8.0]}
    monkeypatch.setattr(kernels_cpu, "interleaved", lambda *_: times)
    row = measured({}, ("nf4",), 3)
    assert row["seconds"]["peer"]["median"] == 6.0
    assert row["times_ours"]["peer / nf4"]["median"] == 2.0
    floors = account(
        Contestant(calls=(), weight_bytes=300),
        50,
        {"bytes_per_second": 100.0, "multiplications_per_second": 200.0},
    )
    assert floors["seconds_at_bandwidth"] == 3.0
    assert floors["seconds_at_peak"] == 0.25


def test_a_run_fills_the_file_and_goes_on_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels_cpu, "QUICK_SHAPES", (SHAPE,))
    monkeypatch.setattr(kernels_cpu, "TOKENS", (1, 9))
    monkeypatch.setattr(
        kernels_cpu, "ceilings_here", lambda: {"bytes_per_second": 1e9, "multiplications_per_second": 1e9}
    )
    rows = Rows(tmp_path / "rows.json", {"benchmark": "test"})
    parts = ("linear", "dequantize", "training")
    benchmark(rows, parts=parts, threads=1, peers=(), quick=True)
    assert len(rows.rows) == 5
    text = report(rows.rows)
    assert "linear, 48 x 64, 9 tokens, 1 threads" in text
    assert "x nf4 [" in text
    monkeypatch.setattr(kernels_cpu, "measured", None)  # nothing is measured again
    benchmark(rows, parts=parts, threads=1, peers=(), quick=True)


def test_a_model_is_quantized_but_for_its_ends_and_measured() -> None:
    model = replaced(tiny_model("llama_gqa").to(torch.bfloat16), _nf3)
    kinds = {name.split(".")[-1]: type(m) for name, m in model.named_modules()}
    assert kinds["q_proj"] is kinds["down_proj"] is LQLinear
    assert kinds["lm_head"] is torch.nn.Linear
    found = speeds(
        {"dense": tiny_model("llama_gqa").to(torch.bfloat16), "nf3": model}, prompt=5, new=2, turns=1
    )
    assert found["bytes"]["nf3"] < found["bytes"]["dense"]
    assert all(speed > 0 for speed in found["decode_tokens_per_second"].values())


def test_memory_is_what_a_model_holds_and_not_what_was_freed_on_the_way() -> None:
    def made() -> torch.nn.Module:
        torch.ones(48 << 20, dtype=torch.uint8)
        model = tiny_model("llama_gqa")
        model.register_buffer("held", torch.ones(24 << 20, dtype=torch.uint8))
        return model

    assert 24 << 20 <= grown_by(made, prompt=5, new=2) < 60 << 20
    assert here(("hqq",)) == ["dense", "nf3"]
    assert here(("bitsandbytes",)) == ["dense", "nf3", "bitsandbytes nf4"]
