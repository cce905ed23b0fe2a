"""One table of kernel backends; every quantized operation of the library goes through it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from compress.errors import UsageError
from compress.kernels import reference
from compress.kernels.reference import Factors, Grid, PackedMatrix


@dataclass(frozen=True, slots=True, kw_only=True)
class Backend:
    """The operations a backend offers, each as documented in :mod:`compress.kernels.reference`.

    Attributes:
        name: What :func:`backend` finds it by.
        quantize_blocks: (blocks [n, B], scales [n], grid) -> uint8 codes [n, B].
        dequantize: (matrix, dtype, start row, stop row) -> [rows, I].
        matmul: (x [..., I], matrix, factors) -> [..., O].
        matmul_transposed: (grad [..., O], matrix, factors) -> [..., I].
    """

    name: str
    quantize_blocks: Callable[[torch.Tensor, torch.Tensor, Grid], torch.Tensor]
    dequantize: Callable[[PackedMatrix, torch.dtype, int, int | None], torch.Tensor]
    matmul: Callable[[torch.Tensor, PackedMatrix, Factors | None], torch.Tensor]
    matmul_transposed: Callable[[torch.Tensor, PackedMatrix, Factors | None], torch.Tensor]


BACKENDS: dict[str, Backend] = {
    "torch": Backend(
        name="torch",
        quantize_blocks=reference.quantize_blocks,
        dequantize=reference.dequantize,
        matmul=reference.matmul,
        matmul_transposed=reference.matmul_transposed,
    )
}


def backend(name: str = "torch") -> Backend:
    """The backend of a name.

    Raises:
        UsageError: There is no such backend.
    """
    if name not in BACKENDS:
        raise UsageError(f"There is no kernel backend {name!r}.", f"Choose one of: {', '.join(BACKENDS)}.")
    return BACKENDS[name]
