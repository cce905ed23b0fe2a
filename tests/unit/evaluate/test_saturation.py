from __future__ import annotations

from typing import Any

import pytest
import torch

from compress.errors import UsageError
from compress.evaluate import saturation as saturation_module
from compress.evaluate.latency import Throughput
from compress.evaluate.saturation import saturation, sequence_bytes
from tests.tiny import tiny_model


def _timed(monkeypatch: pytest.MonkeyPatch, speeds: dict[int, list[float]]) -> list[int]:
    """Replace the clock: the speeds of each batch, one for each measurement; returns the batches measured."""
    measured: list[int] = []

    def throughput(model: Any, ids: torch.Tensor, *, decode_tokens: int, repeats: int) -> Throughput:
        measured.append(len(ids))
        speed = speeds[len(ids)].pop(0)
        return Throughput(
            prefill_tokens_per_second=1.0,
            decode_tokens_per_second=speed,
            batch=len(ids),
            prompt_tokens=ids.shape[1],
            decode_tokens=decode_tokens,
            repeats=repeats,
            threads=1,
            dtype="float32",
            device="cpu",
        )

    monkeypatch.setattr(saturation_module, "throughput", throughput)
    return measured


IDS = torch.arange(4, 12)


def test_it_stops_where_a_doubled_batch_gains_too_little_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    speeds = {1: [10.0], 2: [10.5, 19.0], 4: [30.0], 8: [32.0, 31.0], 16: [99.0]}
    measured = _timed(monkeypatch, speeds)
    found = saturation(tiny_model("llama_mha"), IDS)
    assert measured == [1, 2, 2, 4, 8, 8]
    assert found.steps == ((1, 10.0), (2, 19.0), (4, 30.0), (8, 32.0))
    assert (found.batch, found.tokens_per_second, found.stopped_by) == (8, 32.0, "throughput")


def test_a_batch_that_is_slower_is_not_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    _timed(monkeypatch, {1: [10.0], 2: [8.0, 7.0]})
    found = saturation(tiny_model("llama_mha"), IDS)
    assert (found.batch, found.tokens_per_second) == (1, 10.0)


def test_it_stops_at_the_limit_and_before_memory_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    _timed(monkeypatch, {1: [1.0], 2: [2.0], 4: [4.0]})
    found = saturation(tiny_model("llama_mha"), IDS, limit=5)
    assert (found.batch, found.stopped_by) == (4, "limit")
    model = tiny_model("llama_mha")
    each = sequence_bytes(model, IDS, 16)
    monkeypatch.setattr(saturation_module, "_has_room", lambda device, size: size <= 2 * each)
    _timed(monkeypatch, {1: [1.0], 2: [2.0]})
    assert saturation(model, IDS).stopped_by == "memory"


def test_running_out_of_memory_is_an_answer_but_for_the_first_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(model: Any, ids: torch.Tensor, **_: Any) -> Any:
        if len(ids) >= limit:
            raise torch.OutOfMemoryError("full")
        return Throughput(
            prefill_tokens_per_second=1.0, decode_tokens_per_second=5.0 * len(ids), batch=len(ids),
            prompt_tokens=8, decode_tokens=16, repeats=2, threads=1, dtype="float32", device="cpu",
        )  # fmt: skip

    limit = 4
    monkeypatch.setattr(saturation_module, "throughput", full)
    found = saturation(tiny_model("llama_mha"), IDS)
    assert (found.batch, found.stopped_by) == (2, "memory")
    limit = 1
    with pytest.raises(torch.OutOfMemoryError):
        saturation(tiny_model("llama_mha"), IDS)


def test_bytes_of_a_sequence_are_its_cache_and_logits() -> None:
    model = tiny_model("llama_gqa")  # 2 layers, 4 KV heads of 8
    assert sequence_bytes(model, IDS, 24) == 2 * 2 * 4 * 8 * 4 * (8 + 24) + 4 * 128


def test_a_real_model_decodes_in_batches() -> None:
    found = saturation(tiny_model("gpt2"), IDS, decode_tokens=2, repeats=1, limit=4)
    assert [batch for batch, _ in found.steps] == [1, 2, 4][: len(found.steps)]
    assert found.tokens_per_second == max(speed for _, speed in found.steps) > 0
    assert (found.prompt_tokens, found.decode_tokens) == (8, 2)
    with pytest.raises(UsageError, match="at most 0"):
        saturation(tiny_model("gpt2"), IDS, limit=0)
