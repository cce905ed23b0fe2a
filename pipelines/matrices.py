"""The matrices of a model that quantization works on, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from compress.pipelines.model_input import ModelInput

SHARED_INPUT = {
    "q": "attention",
    "k": "attention",
    "v": "attention",
    "qkv": "attention",
    "gate": "mlp",
    "up": "mlp",
}
"""Roles that read the same hidden states, and so have the same statistics, and may be fused into one matrix."""


VOCABULARY = -1
"""The layer number of the embedding and the output matrix, which come before all layers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Matrix:
    """One matrix to be quantized."""

    layer: int
    module: str
    tensor: str
    shape: tuple[int, int]
    transposed: bool = False
    """Stored [in, out] (Conv1D) instead of [out, in]; ``shape`` is (out, in) either way."""
    role: str = ""
    """What it does in its layer: q, k, v, o, gate, up, down, ..., or embedding, head."""

    @property
    def numel(self) -> int:
        """Weights in it."""
        return self.shape[0] * self.shape[1]


def layer_name(layer: int) -> str:
    """A layer as progress lines call it."""
    return "embeddings" if layer == VOCABULARY else f"layer {layer}"


def matrices_of(model: ModelInput) -> list[Matrix]:
    """The decoder linears of a model, layer by layer."""
    arch = model.architecture
    return [
        Matrix(
            layer=layer,
            module=arch.module_name(layer, linear),
            tensor=arch.tensor_name(layer, linear),
            shape=arch.at(layer).linear_shape(linear),
            transposed=linear.transposed,
            role=linear.role,
        )
        for layer in range(arch.layers)
        for linear in arch.linears_at(layer)
    ]


def left_dense_of(model: ModelInput) -> list[str]:
    """Matrices of the decoder layers that are not among `matrices_of`: their architecture is known in part."""
    prefix = model.architecture.layer_prefix.partition("{")[0]
    known = {matrix.tensor for matrix in matrices_of(model)}
    return [
        name
        for name in model.checkpoint.names
        if name.startswith(prefix) and name not in known and len(model.checkpoint.shape(name)) == 2
    ]


def read_matrix(model: ModelInput, matrix: Matrix) -> Tensor:
    """The weight of a matrix as [out, in], however it is stored."""
    weight = model.checkpoint.read(matrix.tensor)
    return weight.t().contiguous() if matrix.transposed else weight


def fused_groups(matrices: Sequence[Matrix]) -> tuple[tuple[int, ...], ...]:
    """Positions of matrices that serving runtimes store as one, as they read one input: q, k and v, and gate and up."""
    groups: dict[tuple[int, str], list[int]] = {}
    for at, matrix in enumerate(matrices):
        if matrix.role in SHARED_INPUT:
            groups.setdefault((matrix.layer, SHARED_INPUT[matrix.role]), []).append(at)
    return tuple(tuple(group) for group in groups.values() if len(group) > 1)
