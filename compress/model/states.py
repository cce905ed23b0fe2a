"""Hidden states of calibration text in bounded memory: what is over the bound lies in an unnamed file."""

from __future__ import annotations

import tempfile
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """Where hidden states may be.

    Attributes:
        bytes: How many of them in memory.
        folder: Where the others go; the file has no name and is gone with its process.
    """

    bytes: int
    folder: Path


class HiddenStates:
    """A row of tensors that can be replaced one by one by others of the same size.

    Args:
        states: The first ones.
        room: The first so many bytes stay in memory, the rest goes to a file; None: all of them stay.
    """

    def __init__(self, states: Iterable[Tensor], room: Room | None = None) -> None:
        self._room = room
        self._kept: list[Tensor | None] = []
        self._places: list[tuple[int, torch.Size, torch.dtype, torch.device]] = []
        self._file: IO[bytes] | None = None
        used = end = 0
        for state in states:
            size = state.numel() * state.element_size()
            self._places.append((end, state.shape, state.dtype, state.device))
            self._kept.append(None)
            if room is None or used + size <= room.bytes:
                used += size
                self._kept[-1] = state
            else:
                self._write(len(self._kept) - 1, state)
                end += size

    @property
    def spilled(self) -> int:
        """How many lie in the file."""
        return sum(kept is None for kept in self._kept)

    def __len__(self) -> int:
        return len(self._kept)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> Tensor:
        kept = self._kept[index]
        if kept is not None:
            return kept
        start, shape, dtype, device = self._places[index]
        data = torch.empty(shape.numel() * dtype.itemsize, dtype=torch.uint8)
        file = self._opened()
        file.seek(start)
        if file.readinto(data.numpy().data) != len(data):  # type: ignore[attr-defined]
            raise OSError("hidden states that were written to a file could not be read back")
        return data.view(dtype).reshape(shape).to(device)

    def __setitem__(self, index: int, state: Tensor) -> None:
        _, shape, dtype, _ = self._places[index]
        if state.shape != shape or state.dtype != dtype:
            raise ValueError(f"states of {tuple(shape)} cannot be replaced by {tuple(state.shape)}")
        if self._kept[index] is not None:
            self._kept[index] = state
        else:
            self._write(index, state)

    def _write(self, index: int, state: Tensor) -> None:
        file = self._opened()
        file.seek(self._places[index][0])
        file.write(state.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)

    def _opened(self) -> IO[bytes]:
        if self._file is None:
            if self._room is None:
                raise ValueError("there is no room for a file")
            self._room.folder.mkdir(parents=True, exist_ok=True)
            self._file = tempfile.TemporaryFile(dir=self._room.folder)  # noqa: SIM115 (closed with the states)
            weakref.finalize(self, self._file.close)
        return self._file
