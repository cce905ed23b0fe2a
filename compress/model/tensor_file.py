"""One safetensors file: its header, checked, its tensors, read one at a time without mapping the file, and writing."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import torch

from compress.errors import CompressError

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""safetensors' dtype names."""

DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

_NUMPY = {torch.float64: "<f8", torch.float32: "<f4", torch.float16: "<f2"}

_MOST_ELEMENTS = 1 << 59
_MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors library


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorEntry:
    """Where one tensor lies: file, absolute byte offset, dtype and shape."""

    file: Path
    offset: int
    nbytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    def read(self) -> torch.Tensor:
        """The tensor, in memory of its own."""
        data = torch.empty(self.nbytes, dtype=torch.uint8)
        self._read(data)
        return data.view(self.dtype).reshape(self.shape)

    def read_into(self, target: torch.Tensor) -> None:
        """Read the tensor into memory that is there: on the CPU, contiguous, of its shape and dtype."""
        assert target.is_contiguous()
        assert (tuple(target.shape), target.dtype) == (self.shape, self.dtype)
        self._read(target.reshape(-1).view(torch.uint8))

    def _read(self, data: torch.Tensor) -> None:
        with self.file.open("rb") as stream:
            stream.seek(self.offset)
            got = stream.readinto(data.numpy().data) if self.nbytes else 0
        if got != self.nbytes:
            raise _broken(self.file, "it is shorter than when it was opened")

    def chunks(self, size: int = 16 << 20) -> Iterator[bytes]:
        """The stored bytes in pieces of at most ``size`` bytes."""
        left = self.nbytes
        with self.file.open("rb") as stream:
            stream.seek(self.offset)
            while left > 0:
                piece = stream.read(min(size, left))
                if not piece:
                    raise _broken(self.file, "it is shorter than when it was opened")
                left -= len(piece)
                yield piece


class RepeatedName(ValueError):
    """A JSON object names a member twice, and readers would differ in which one they take."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose members all have different names; for ``object_pairs_hook``.

    Raises:
        RepeatedName: Two are the same.
    """
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise RepeatedName(name)
        found[name] = value
    return found


def header_bytes(
    tensors: Mapping[str, tuple[torch.dtype, list[int], int]], metadata: Mapping[str, str]
) -> bytes:
    """What a safetensors file begins with, the same bytes for the same content.

    Args:
        tensors: Dtype, shape and bytes of every tensor by name, in the order in which they follow. Widest dtypes must
            come first: then every tensor starts at a multiple of its element size, as readers need.
        metadata: Strings by name.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **dict(sorted(metadata.items()))}}
    end = 0
    for name, (dtype, shape, size) in tensors.items():
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def save_tensors(file: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Write a small safetensors file, durably. Unlike safetensors' own writer, the same content gives the same bytes.

    Args:
        file: Replaced if it is there.
        tensors: By name.
        metadata: Strings by name.
    """
    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    ordered = dict(sorted(stored.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])))
    sizes = {name: (t.dtype, list(t.shape), t.numel() * t.dtype.itemsize) for name, t in ordered.items()}
    with file.open("wb") as target:
        target.write(header_bytes(sizes, metadata))
        for tensor in ordered.values():
            target.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
        target.flush()
        os.fsync(target.fileno())


def read_header(file: Path) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    """Tensor entries and metadata of a safetensors file.

    Raises:
        CompressError: The header is unreadable, or its shapes, dtypes, offsets and the file size disagree.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        prefix = stream.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else _MAX_HEADER + 1
        if length > min(_MAX_HEADER, size - 8):
            raise _broken(file, "its header does not fit into it")
        raw = stream.read(length)
    try:
        header = json.loads(raw, object_pairs_hook=unique)
    except RepeatedName as error:
        raise _broken(file, f"its header names {error.name!r} twice") from error
    except (ValueError, RecursionError) as error:
        raise _broken(file, "its header is no JSON") from error
    if not isinstance(header, dict):
        raise _broken(file, "its header is no JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _broken(file, "its metadata are no strings by name")
    start, data_bytes = 8 + length, size - 8 - length
    entries = {name: _entry(file, name, value, start, data_bytes) for name, value in header.items()}
    end = start
    for entry in sorted(entries.values(), key=lambda e: (e.offset, e.nbytes)):
        if entry.offset != end:
            raise _broken(file, "its tensors overlap or leave holes")
        end += entry.nbytes
    if end != size:
        raise _broken(file, "its size is not what its header says")
    return entries, metadata


def all_finite(data: bytes, dtype: torch.dtype) -> bool:
    """Whether none of these stored numbers is NaN or infinite.

    Args:
        data: Whole elements, little-endian.
        dtype: Theirs; integers are always finite.
    """
    if dtype in _NUMPY:
        return bool(np.isfinite(np.frombuffer(data, dtype=_NUMPY[dtype])).all())
    if dtype == torch.bfloat16:
        return not bool(((np.frombuffer(data, dtype="<u2") & 0x7F80) == 0x7F80).any())
    if not dtype.is_floating_point:
        return True
    numbers = (
        torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
    )
    return bool(numbers.view(dtype).float().isfinite().all())


def _entry(file: Path, name: str, value: Any, start: int, data_bytes: int) -> TensorEntry:
    if not isinstance(value, dict):
        raise _broken(file, f"the entry of {name!r} is no JSON object")
    shape, offsets, dtype = value.get("shape"), value.get("data_offsets"), DTYPES.get(str(value.get("dtype")))
    if dtype is None:
        raise _broken(file, f"{name!r} has the unknown dtype {value.get('dtype')!r}")
    if not _naturals(shape) or not _naturals(offsets) or len(offsets) != 2:
        raise _broken(file, f"the shape or offsets of {name!r} are no lists of natural numbers")
    begin, end = offsets
    if not begin <= end <= data_bytes or end - begin != _count(shape, data_bytes) * dtype.itemsize:
        raise _broken(file, f"the shape of {name!r} contradicts its bytes")
    return TensorEntry(file=file, offset=start + begin, nbytes=end - begin, dtype=dtype, shape=tuple(shape))


def _count(shape: list[int], most: int) -> int:
    """Elements of a shape, or more than ``most``: a product of a million large numbers would take for ever.

    So it is where no tensor can have the shape, though one of its sizes is 0.
    """
    empty, count = 0 in shape, 1
    for size in shape:
        count *= size or 1
        if count > (_MOST_ELEMENTS if empty else most):
            return most + 1
    return 0 if empty else count


def _naturals(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _broken(file: Path, reason: str) -> CompressError:
    return CompressError(f"The weight file {file} is broken: {reason}.", "Download or convert it again.")
