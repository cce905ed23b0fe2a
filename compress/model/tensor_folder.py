"""Tensors by name in a folder, one file each: a mapping for what would not fit into memory together."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from compress.model.tensor_file import save_tensors

_NAME = "tensor"


class TensorFolder(MutableMapping[str, Tensor]):
    """A mapping whose values are read at every look and written at every assignment, bit by bit as they were.

    Args:
        folder: Where the files are, made by the first assignment; nothing else should be in it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __getitem__(self, name: str) -> Tensor:
        if name not in self:
            raise KeyError(name)
        with safe_open(str(self._file(name)), framework="pt") as file:
            found: Tensor = file.get_tensor(_NAME)
        return found

    def __setitem__(self, name: str, tensor: Tensor) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        save_tensors(self._file(name), {_NAME: tensor}, {})

    def __delitem__(self, name: str) -> None:
        if name not in self:
            raise KeyError(name)
        self._file(name).unlink()

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self._file(name).is_file()

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(file.stem for file in self.folder.glob("*.safetensors")))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"
