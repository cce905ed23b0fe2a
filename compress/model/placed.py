"""Write a safetensors file whose tensors are known by shape before they are known by value."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext, suppress
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

from compress.model.tensor_file import header_bytes

Spec = tuple[tuple[int, ...], torch.dtype]
"""Shape and dtype."""


class PlacedWriter:
    """Write tensors in any order, each to its own place, never holding more than one.

    The bytes are those of safetensors' own writer: widest dtypes first, then by name. As with it, the caller has to
    say when the disk must hold them. Use it as a context manager: leaving it by an exception removes the file.

    Args:
        file: Replaced if it is there.
        specs: Shape and dtype of every tensor, by name.
    """

    def __init__(self, file: Path, specs: Mapping[str, Spec]) -> None:
        self.file = file
        ordered = sorted(specs.items(), key=lambda item: (-item[1][1].itemsize, item[0]))
        sizes = {name: (dtype, list(shape), prod(shape) * dtype.itemsize) for name, (shape, dtype) in ordered}
        header = header_bytes(sizes, {})
        self._specs = dict(ordered)
        self._starts: dict[str, int] = {}
        end = len(header)
        for name, (_, _, size) in sizes.items():
            self._starts[name] = end
            end += size
        self._stream = file.open("wb")
        try:
            self._stream.write(header)
            self._stream.truncate(end)
        except BaseException:
            self._close()
            file.unlink(missing_ok=True)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                if self._starts:
                    raise ValueError(
                        f"{len(self._starts)} tensors were not written, {min(self._starts)!r} first"
                    )
                self._stream.flush()
                return
        except BaseException:
            self.file.unlink(missing_ok=True)
            raise
        finally:
            self._close(quietly=kind is not None)
        self.file.unlink(missing_ok=True)

    def _close(self, *, quietly: bool = True) -> None:
        """What a disk refuses has been said already where ``quietly``; the stream is closed either way."""
        with suppress(OSError) if quietly else nullcontext():
            self._stream.close()

    def put(self, name: str, tensor: torch.Tensor) -> None:
        """Write one tensor.

        Raises:
            ValueError: It was written before, is not foreseen, or has another shape or dtype.
        """
        if name not in self._starts or self._specs[name] != (tuple(tensor.shape), tensor.dtype):
            raise ValueError(
                f"tensor {name!r} {list(tensor.shape)} {tensor.dtype} has no place in {self.file}"
            )
        stored = tensor.detach().to("cpu").contiguous()
        self._stream.seek(self._starts.pop(name))
        self._stream.write(stored.reshape(-1).view(torch.uint8).numpy().data)
