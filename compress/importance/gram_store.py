"""Second moments on disk: what scoring has gathered need not be gathered again for the repair."""

from __future__ import annotations

from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from compress.durable import replacing
from compress.model.architecture import Architecture, LinearSpec

LIMIT = 4 << 30
"""Bytes up to which the moments of a model are kept; above, they are gathered twice."""


class GramStore:
    """Gram matrices ``X X^T`` [C, C] of the inputs of linears, float32, one file a layer.

    Args:
        folder: Where the files are; made by the first ``put``.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def put(self, layer: int, grams: dict[LinearSpec, Tensor]) -> None:
        """Keep the matrices of one layer."""
        self.folder.mkdir(parents=True, exist_ok=True)
        tensors = {spec.name: gram.float().cpu().contiguous() for spec, gram in grams.items()}
        with replacing(self._file(layer)) as temporary:
            save_file(tensors, str(temporary))

    def has(self, layer: int) -> bool:
        """Whether the matrices of one layer are there."""
        return self._file(layer).is_file()

    def complete(self, arch: Architecture) -> bool:
        """Whether every layer is there."""
        return all(self.has(layer) for layer in range(arch.layers))

    def get(self, layer: int, spec: LinearSpec) -> Tensor:
        """One matrix, float32."""
        with safe_open(str(self._file(layer)), framework="pt") as file:
            gram: Tensor = file.get_tensor(spec.name)
        return gram

    def _file(self, layer: int) -> Path:
        return self.folder / f"layer-{layer}.safetensors"


def fits(arch: Architecture, roles: tuple[str, ...]) -> bool:
    """Whether the moments of the inputs of these roles are small enough to be kept."""
    widths = [arch.linear_shape(spec)[1] for spec in arch.linears if spec.role in roles]
    return 4 * arch.layers * sum(width * width for width in widths) <= LIMIT
