"""Small safetensors files: the same bytes for the same content, read by the library; names once; finite numbers."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from compress.errors import CompressError
from compress.model.checkpoint import Checkpoint
from compress.model.tensor_file import DTYPES, all_finite, read_header, save_tensors
from tests.tiny import tiny_checkpoint

FLOATS = [dtype for dtype in DTYPES.values() if dtype.is_floating_point]


def test_the_library_reads_what_was_written(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"{name}.{n}": torch.randint(0, 2, (n, 3), generator=generator).to(dtype)
        for name, dtype in DTYPES.items()
        for n in (0, 1, 5)
    }
    tensors["turned"] = torch.randn(3, 7, generator=generator).T
    tensors["scalar"] = torch.tensor(3.0)
    save_tensors(tmp_path / "a", tensors, {"format": "mine", "b": "2", "a": "1"})
    with safe_open(str(tmp_path / "a"), framework="pt") as file:
        assert file.metadata() == {"format": "mine", "a": "1", "b": "2"}
        assert set(file.keys()) == set(tensors)
        for name, tensor in tensors.items():
            found = file.get_tensor(name)
            assert found.dtype == tensor.dtype
            assert torch.equal(found.float(), tensor.float())
    entries, metadata = read_header(tmp_path / "a")
    assert metadata["format"] == "mine"
    for name, tensor in tensors.items():
        into = torch.zeros(2, *tensor.shape, dtype=tensor.dtype)
        entries[name].read_into(into[1])
        assert torch.equal(into[1].float(), tensor.float())
        assert not into[0].float().any()
        assert torch.equal(entries[name].read().float(), tensor.float())
    assert all(entry.offset % entry.dtype.itemsize == 0 for entry in entries.values())


def test_order_changes_no_byte(tmp_path: Path) -> None:
    tensors = {name: torch.full((2,), float(n)) for n, name in enumerate("cab")}
    metadata = {name: name for name in "xzy"}
    save_tensors(tmp_path / "a", tensors, metadata)
    save_tensors(tmp_path / "b", dict(reversed(tensors.items())), dict(reversed(metadata.items())))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_header_that_names_a_tensor_twice_is_refused(tmp_path: Path) -> None:
    entry = '{"dtype":"F32","shape":[1],"data_offsets":[%d,%d]}'
    text = ('{"a":' + entry % (0, 4) + ',"a":' + entry % (4, 8) + "}").encode()
    (tmp_path / "a").write_bytes(struct.pack("<Q", len(text)) + text + bytes(8))
    with pytest.raises(CompressError, match="its header names 'a' twice"):
        read_header(tmp_path / "a")


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@given(data=st.binary(min_size=0, max_size=64))
def test_finite_as_torch_has_it(dtype: torch.dtype, data: bytes) -> None:
    data = data[: len(data) // 8 * 8]
    numbers = torch.tensor(list(data), dtype=torch.uint8).view(dtype)
    assert all_finite(data, dtype) == bool(numbers.double().isfinite().all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_one_number_is_enough(dtype: torch.dtype) -> None:
    for value in (float("nan"), float("inf"), float("-inf")):
        numbers = torch.ones(9, dtype=dtype)
        assert all_finite(numbers.view(torch.uint8).numpy().tobytes(), dtype)
        numbers[7] = value
        assert not all_finite(numbers.view(torch.uint8).numpy().tobytes(), dtype)
    assert all_finite(b"\xff" * 8, torch.int64)


def test_a_checkpoint_names_the_tensor_that_is_not_finite(tmp_path: Path) -> None:
    folder = tiny_checkpoint("llama_gqa", tmp_path / "model", dtype=torch.bfloat16)
    Checkpoint(folder).require_finite()
    file = folder / "model.safetensors"
    entries, _ = read_header(file)
    content = bytearray(file.read_bytes())
    place = entries["model.layers.1.mlp.up_proj.weight"].offset + 10
    content[place : place + 2] = b"\x80\x7f"  # bfloat16 infinity
    file.write_bytes(content)
    with pytest.raises(CompressError, match=r"'model\.layers\.1\.mlp\.up_proj\.weight' .* not finite"):
        Checkpoint(folder).require_finite()
