from __future__ import annotations

import mmap
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compress.evaluate import memory, memory_timeline
from compress.evaluate.memory_timeline import MemoryTimeline, Thinned

MEGABYTE = 1 << 20


@given(st.lists(st.integers(0, 2**40), max_size=400), st.sampled_from([2, 4, 10, 64]))
def test_a_thinned_series_is_the_largest_of_every_stride(samples: list[int], limit: int) -> None:
    series = Thinned(limit)
    for sample in samples:
        series.add(sample)
    stride = 1
    while len(samples) > limit * stride:
        stride *= 2
    assert series.stride == stride
    assert series.values == [max(samples[n : n + stride]) for n in range(0, len(samples), stride)]


@pytest.mark.parametrize("limit", [-2, 0, 1, 3])
def test_a_limit_that_cannot_be_halved_is_refused(limit: int) -> None:
    with pytest.raises(ValueError, match="even"):
        Thinned(limit)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_the_timeline_sees_memory_come_and_go() -> None:
    with MemoryTimeline(interval=0.01, limit=10_000) as timeline:
        before = _last(timeline)
        with mmap.mmap(-1, 200 * MEGABYTE) as pages:
            touched = torch.frombuffer(pages, dtype=torch.uint8).fill_(1)
            assert _until(lambda: _last(timeline) - before > 150 * MEGABYTE)
            during = _last(timeline)
            del touched
        assert _until(lambda: during - _last(timeline) > 150 * MEGABYTE)
    record = timeline.record()
    assert record is not None
    assert record["interval_seconds"] == 0.01
    assert "device_bytes" not in record or torch.cuda.is_initialized()
    count = len(_values(timeline))
    time.sleep(0.1)
    assert len(_values(timeline)) == count  # nothing is read after the block


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_an_error_passes_and_ends_the_thread() -> None:
    with pytest.raises(KeyError), MemoryTimeline(interval=0.01):
        raise KeyError
    assert not [thread for thread in threading.enumerate() if thread.name == "memory timeline"]


def test_without_proc_nothing_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_STATUS", tmp_path / "status")
    with MemoryTimeline(interval=0.01) as timeline:
        time.sleep(0.05)
    assert timeline.record() is None


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_of_a_gpu_is_recorded_from_its_first_use(monkeypatch: pytest.MonkeyPatch) -> None:
    held, asked = iter([None, 5, 9, 7]), set()

    def held_now(device: str | None) -> int | None:
        asked.add(device)
        return next(held, 7)

    monkeypatch.setattr(memory_timeline, "_device_bytes", held_now)
    with MemoryTimeline(interval=0.01, device="cuda:1") as timeline:
        assert _until(lambda: len(_values(timeline)) >= 4)
    record = timeline.record()
    assert record is not None
    device = record["device_bytes"]
    assert isinstance(device, list)
    assert device[:4] == [0, 5, 9, 7]
    assert timeline.device_peak == 9
    assert asked == {"cuda:1"}
    assert len(device) == len(_values(timeline))


def _values(timeline: MemoryTimeline) -> list[int]:
    record = timeline.record()
    assert record is not None
    values = record["host_bytes"]
    assert isinstance(values, list)
    return values


def _last(timeline: MemoryTimeline) -> int:
    return _values(timeline)[-1]


def _until(condition: Callable[[], bool]) -> bool:
    """Whether ``condition`` comes true within a minute: on a busy machine a thread may wait for long."""
    deadline = time.monotonic() + 60
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True
