"""Write a Hugging Face checkpoint tensor by tensor, never holding more than one tensor."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import torch

from compress.errors import CompressError
from compress.model.tensor_file import header_bytes


class _Shard:
    """Bytes of the tensors of one file, in the order they came, in a temporary file."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.stream: IO[bytes] = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (closed with the shard)
        self.tensors: list[
            tuple[str, torch.dtype, list[int], int, int]
        ] = []  # name, dtype, shape, start, bytes
        self.size = 0

    def add(self, name: str, tensor: torch.Tensor, data: torch.Tensor) -> None:
        self.tensors.append((name, tensor.dtype, list(tensor.shape), self.size, data.numel()))
        self.stream.write(data.numpy().data)
        self.size += data.numel()

    def close(self, file: Path, metadata: Mapping[str, str]) -> None:
        # Widest dtypes first: then every tensor starts at a multiple of its element size, as readers need.
        ordered = sorted(self.tensors, key=lambda t: (-t[1].itemsize, t[3]))
        sizes = {name: (dtype, shape, size) for name, dtype, shape, _, size in ordered}
        with file.open("wb") as target:
            target.write(header_bytes(sizes, metadata))
            for _, _, _, start, size in ordered:
                self.stream.seek(start)
                _copy(self.stream, target, size)
            target.flush()
            os.fsync(target.fileno())
        self.stream.close()


def _copy(source: IO[bytes], target: IO[bytes], size: int) -> None:
    while size > 0:
        piece = source.read(min(size, 16 << 20))
        target.write(piece)
        size -= len(piece)


class CheckpointWriter:
    """Stream tensors into ``model.safetensors`` (or shards with an index) and config.json.

    Use it as a context manager: leaving it normally finishes the checkpoint, leaving it by an exception
    removes every file it wrote. A shard is closed when it would pass ``max_shard_bytes``; until then its
    bytes lie in an unnamed temporary file in the same folder.

    Args:
        path: The folder, created when missing.
        config: The content of config.json (``_name_or_path`` is dropped: it leaks local paths).
        max_shard_bytes: Tensor bytes per file; one larger tensor still gets a file of its own.
        metadata: Strings for the header of every weight file.

    Raises:
        CompressError: The folder already holds weights.
    """

    def __init__(
        self,
        path: Path | str,
        *,
        config: Mapping[str, Any],
        max_shard_bytes: int = 2 << 30,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self.path = Path(path)
        self.config = {key: value for key, value in config.items() if key != "_name_or_path"}
        self.max_shard_bytes = max_shard_bytes
        self.metadata = dict(metadata or {})
        self.path.mkdir(parents=True, exist_ok=True)
        if any(self.path.glob("*.safetensors")):
            raise CompressError(f"The folder {self.path} already holds weights.", "Choose an empty folder.")
        self._shard: _Shard | None = None
        self._closed: list[tuple[Path, list[str]]] = []
        self._names: set[str] = set()
        self._bytes = 0
        self._parameters = 0
        self._written: list[Path] = []
        self._finished = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.finish()
            return
        if self._shard is not None:
            self._shard.stream.close()
        for file in self._written:
            file.unlink(missing_ok=True)

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Write one tensor; dtype and shape are kept.

        Raises:
            ValueError: The name was added before, or the checkpoint is finished.
        """
        if self._finished or name in self._names:
            raise ValueError(f"tensor {name!r} was already written, or the checkpoint is finished")
        stored = tensor.detach().to("cpu").contiguous()
        data = stored.reshape(-1).view(torch.uint8)
        if self._shard is not None and self._shard.size + data.numel() > self.max_shard_bytes:
            self._close_shard()
        if self._shard is None:
            self._shard = _Shard(self.path)
        self._shard.add(name, stored, data)
        self._names.add(name)
        self._bytes += data.numel()
        self._parameters += stored.numel()

    def _close_shard(self) -> None:
        if self._shard is None:
            return
        file = self.path / f"shard-{len(self._closed) + 1:05d}.partial"
        self._written.append(file)
        self._shard.close(file, self.metadata)
        self._closed.append((file, [name for name, *_ in self._shard.tensors]))
        self._shard = None

    def finish(self) -> Path:
        """Close the last shard, name the files, write index and config; returns the folder. Idempotent.

        Raises:
            ValueError: No tensor was added.
        """
        if self._finished:
            return self.path
        if not self._names:
            raise ValueError("a checkpoint needs at least one tensor")
        self._close_shard()
        weight_map: dict[str, str] = {}
        for number, (file, names) in enumerate(self._closed, start=1):
            single = len(self._closed) == 1
            final = (
                "model.safetensors"
                if single
                else f"model-{number:05d}-of-{len(self._closed):05d}.safetensors"
            )
            self._written.append(file.rename(self.path / final))
            weight_map |= dict.fromkeys(names, final)
        if len(self._closed) > 1:
            totals = {"total_size": self._bytes, "total_parameters": self._parameters}
            index = {"metadata": totals, "weight_map": dict(sorted(weight_map.items()))}
            self._write_json("model.safetensors.index.json", index)
        self._write_json("config.json", self.config)
        self._finished = True
        return self.path

    def _write_json(self, name: str, content: Mapping[str, Any]) -> None:
        file = self.path / name
        self._written.append(file)
        file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
