"""One safetensors file: its header, checked, and its tensors, read one at a time without mapping the file."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

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
        with self.file.open("rb") as stream:
            stream.seek(self.offset)
            got = stream.readinto(data.numpy().data) if self.nbytes else 0
        if got != self.nbytes:
            raise _broken(self.file, "it is shorter than when it was opened")
        return data.view(self.dtype).reshape(self.shape)

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
        header = json.loads(raw)
    except ValueError as error:
        raise _broken(file, "its header is no JSON") from error
    if not isinstance(header, dict):
        raise _broken(file, "its header is no JSON object")
    metadata = header.pop("__metadata__", {})
    start, data_bytes = 8 + length, size - 8 - length
    entries = {name: _entry(file, name, value, start, data_bytes) for name, value in header.items()}
    end = start
    for entry in sorted(entries.values(), key=lambda e: (e.offset, e.nbytes)):
        if entry.offset != end:
            raise _broken(file, "its tensors overlap or leave holes")
        end += entry.nbytes
    if end != size:
        raise _broken(file, "its size is not what its header says")
    return entries, dict(metadata) if isinstance(metadata, dict) else {}


def _entry(file: Path, name: str, value: Any, start: int, data_bytes: int) -> TensorEntry:
    if not isinstance(value, dict):
        raise _broken(file, f"the entry of {name!r} is no JSON object")
    shape, offsets, dtype = value.get("shape"), value.get("data_offsets"), DTYPES.get(str(value.get("dtype")))
    if dtype is None:
        raise _broken(file, f"{name!r} has the unknown dtype {value.get('dtype')!r}")
    if not _naturals(shape) or not _naturals(offsets) or len(offsets) != 2:
        raise _broken(file, f"the shape or offsets of {name!r} are no lists of natural numbers")
    begin, end = offsets
    if not begin <= end <= data_bytes or end - begin != math.prod(shape) * dtype.itemsize:
        raise _broken(file, f"the shape of {name!r} contradicts its bytes")
    return TensorEntry(file=file, offset=start + begin, nbytes=end - begin, dtype=dtype, shape=tuple(shape))


def _naturals(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _broken(file: Path, reason: str) -> CompressError:
    return CompressError(f"The weight file {file} is broken: {reason}.", "Download or convert it again.")
