"""Results that an interrupted run need not make again: one file each, in a folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from compress.durable import replacing
from compress.model.tensor_file import save_tensors


class Kept:
    """Tensors by the name of what made them; whoever owns the folder sees that it belongs to one request only.

    Args:
        folder: Made when the first result is; None keeps nothing.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder

    def path(self, name: str) -> Path | None:
        """A folder within this one, for results of another kind; None where nothing is kept."""
        return None if self._folder is None else self._folder / name

    def has(self, name: str) -> bool:
        """Whether ``name`` was made before."""
        return self._folder is not None and self._file(self._folder, name).is_file()

    def get(self, name: str) -> dict[str, Tensor]:
        """What was put under ``name``, on the CPU.

        Raises:
            KeyError: Nothing was.
        """
        if self._folder is None or not self.has(name):
            raise KeyError(name)
        found: dict[str, Tensor] = load_file(self._file(self._folder, name))
        return found

    def put(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep tensors; once this returns, no crash loses them."""
        if self._folder is None:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        with replacing(self._file(self._folder, name)) as temporary:
            save_tensors(temporary, tensors, {})

    def tensors(self, name: str, make: Callable[[], Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
        """What was put under ``name``, else what ``make`` returns, which is put there."""
        if self.has(name):
            return self.get(name)
        found = make()
        self.put(name, found)
        return found

    def number(self, name: str, make: Callable[[], float]) -> float:
        """The same for a single number."""
        value = self.tensors(name, lambda: {"value": torch.tensor(make(), dtype=torch.float64)})["value"]
        return float(value)

    @staticmethod
    def _file(folder: Path, name: str) -> Path:
        return folder / f"{name}.safetensors"


NOTHING_KEPT = Kept(None)
"""For who makes everything anew."""
