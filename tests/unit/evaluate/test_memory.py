from __future__ import annotations

import json
import mmap
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from compress.errors import CompressError
from compress.evaluate import memory
from compress.evaluate.memory import PeakMemory, file_bytes, resident_bytes
from tests.tiny import tiny_checkpoint, tiny_model

MEGABYTE = 1 << 20


@contextmanager
def _resident(megabytes: int) -> Iterator[None]:
    """Fresh pages from the system: the C allocator may serve a tensor from pages that are resident already."""
    with mmap.mmap(-1, megabytes * MEGABYTE) as pages:
        touched = torch.frombuffer(pages, dtype=torch.uint8).fill_(1)
        yield
        del touched


def _allocate_and_free(megabytes: int) -> None:
    with _resident(megabytes):
        return


def test_peak_sees_memory_that_is_gone_again() -> None:
    with PeakMemory() as idle:
        _allocate_and_free(1)
    with PeakMemory() as busy:
        _allocate_and_free(300)
    assert idle.method == busy.method
    assert busy.host_bytes > 300 * MEGABYTE
    assert busy.device_bytes is None
    if busy.method != "lifetime":
        with PeakMemory() as after:
            _allocate_and_free(1)
        assert busy.host_bytes - after.host_bytes > 200 * MEGABYTE


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_sampling_when_the_high_water_mark_cannot_be_reset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "_CLEAR_REFS", tmp_path / "missing" / "clear_refs")
    with PeakMemory() as before:
        _allocate_and_free(1)
    with PeakMemory() as peak, _resident(200):
        time.sleep(1)  # two hundred times the sampling interval
    assert peak.method == "sampled"
    assert peak.host_bytes - before.host_bytes > 150 * MEGABYTE


@pytest.mark.skipif(sys.platform == "win32", reason="no resource module")
def test_lifetime_peak_without_proc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_CLEAR_REFS", tmp_path / "missing" / "clear_refs")
    monkeypatch.setattr(memory, "_STATUS", tmp_path / "status")
    with PeakMemory() as peak:
        _allocate_and_free(1)
    assert peak.method == "lifetime"
    assert peak.host_bytes > 50 * MEGABYTE


def test_resident_bytes_counts_tied_weights_once() -> None:
    for kind in ("llama_gqa", "llama_tied"):
        model = tiny_model(kind)
        buffers = {b.data_ptr(): b.numel() * b.element_size() for b in model.buffers()}
        expected = sum(p.numel() * 4 for p in model.parameters()) + sum(buffers.values())
        assert resident_bytes(model) == expected


def test_file_bytes_counts_what_a_loader_reads(tmp_path: Path) -> None:
    single = tiny_checkpoint("llama_gqa", tmp_path / "single")
    (single / "structure.safetensors").write_bytes(b"x" * 1000)
    assert file_bytes(single) == (single / "model.safetensors").stat().st_size
    sharded = tmp_path / "sharded"
    tiny_model("llama_gqa").save_pretrained(sharded, max_shard_size="40KB")
    shards = list(sharded.glob("model-*.safetensors"))
    assert len(shards) > 1
    assert file_bytes(sharded) == sum(shard.stat().st_size for shard in shards)
    weight_map = json.loads((sharded / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(weight_map.values()) == {shard.name for shard in shards}
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_model.safetensors").write_bytes(b"x" * 77)
    assert file_bytes(adapter) == file_bytes(adapter / "adapter_model.safetensors") == 77
    with pytest.raises(CompressError, match="no weight file"):
        file_bytes(tmp_path)
