"""One table of kernel backends; every quantized operation of the library goes through it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import torch

from compress.errors import UsageError
from compress.kernels import gpu, native_product, reference
from compress.kernels.library import library
from compress.kernels.packed import TiledMatrix
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


def products(tensor: torch.Tensor) -> ModuleType:
    """The module whose ``product``, ``product_transposed`` and ``dequantize`` are for a tensor's device.

    It is :mod:`compress.kernels.native_product` on a CPU and :mod:`compress.kernels.triton.product` on a GPU.
    """
    if tensor.device.type == "cpu" and not gpu.on_gpu(tensor):
        return native_product
    from compress.kernels.triton import product

    return product


def native_serves(x: torch.Tensor) -> bool:
    """Whether products with ``x`` run on a tiled matrix: in the C library on a CPU, in Triton's kernels on a GPU.

    They take a :class:`~compress.kernels.packed.TiledMatrix` and factors as they are stored, so they are functions of
    their own and no :class:`Backend`.
    """
    return gpu.multiplies(x) or (native_product.serves(x) and library() is not None)


def native_matmul(
    x: torch.Tensor, matrix: TiledMatrix, factors: native_product.StoredFactors | None
) -> torch.Tensor:
    """``x @ (Q + L1.T @ L2).T`` for x [..., I]; see :func:`compress.kernels.native_product.product`."""
    flat = x.reshape(-1, x.shape[-1])
    y: torch.Tensor = products(x).product(flat, matrix, factors)[0]
    return y.view(*x.shape[:-1], y.shape[1])


def native_matmul_transposed(
    grad: torch.Tensor, matrix: TiledMatrix, factors: native_product.StoredFactors | None
) -> torch.Tensor:
    """``grad @ (Q + L1.T @ L2)`` for grad [..., O]."""
    flat = grad.reshape(-1, grad.shape[-1])
    out: torch.Tensor = products(grad).product_transposed(flat, matrix, factors)
    return out.view(*grad.shape[:-1], out.shape[1])
