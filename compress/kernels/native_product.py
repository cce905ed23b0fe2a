"""Products with a tiled matrix by the C library, and its weights; the same as torch operations with autograd rules.

Few tokens: codes are decoded in registers, or a tile at a time into the cache. Many, and gradients: a slice is
dequantized into a bounded workspace and torch multiplies it. Sums are float32 whatever the type of the input. Where
the processor multiplies bfloat16, inputs of that type meet table entries rounded to it, or rounded weights in slices.

Shapes: O out, I in, T tokens, r rank. Types: float32, bfloat16, float16.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from compress.errors import UsageError
from compress.kernels.library import LEVELS
from compress.kernels.packed import NativeMatrix, TiledMatrix, address, check, needed
from compress.kernels.pages import empty

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""Types of inputs and results, by their number in the library."""

DENSE_FROM = {"scalar": 6, "avx2": 160, "avx512": 160, "avx512_bf16": 160}
"""Tokens from which a slice of dequantized rows times torch's product is faster than the tiles, by level."""

NARROW_FROM = 160 if torch.cpu._is_amx_tile_supported() else 1024
"""The same for bfloat16 at the level avx512_bf16. Before it the tiles are as fast, without rounding whole weights; but
not as torch is with AMX."""

_SLICE = 1 << 20
"""Weights of the workspace that slices are dequantized into."""

StoredFactors = tuple[Tensor, Tensor]
"""Low-rank factors as they are stored, in the type of the input: (L1 [r, O], L2 [r, I]), contiguous."""


def serves(x: Tensor) -> bool:
    """Whether the library multiplies this input, if it is there."""
    return x.device.type == "cpu" and x.dtype in TYPES


def _native(matrix: TiledMatrix) -> NativeMatrix:
    """The matrix for the library; made once, and again where a tensor has moved."""
    m, g = matrix, matrix.geometry
    places = (
        m.codes.data_ptr(),
        m.scale_codes.data_ptr(),
        m.steps.data_ptr(),
        m.table.data_ptr(),
        m.offset.data_ptr(),
    )
    if m.made and m.made[0][0] == places:
        return m.made[0][1]
    native = NativeMatrix(
        *places,
        rows=g.rows,
        columns=g.columns,
        blocks=g.blocks,
        block_size=g.block_size,
        group_size=min(g.group_size, g.rows * g.blocks),
        groups=matrix.steps.numel(),
        bits=g.bits,
        scale_bits=g.scale_bits,
    )
    m.made[:] = [(places, native)]
    return native


def dequantize_into(out: Tensor, matrix: TiledMatrix, start: int, first_column: int = 0) -> None:
    """Write weights of the rows and columns from some on: table entry times scale in float32, rounded once.

    Args:
        out: [rows, columns], contiguous, of a type in :data:`TYPES`.
        matrix: The tiled matrix.
        start: First row.
        first_column: A multiple of 32.
    """
    number = ctypes.c_int64
    needed().ck_dequantize(
        ctypes.byref(_native(matrix)),
        *(number(start), number(start + out.shape[0])),
        *(number(first_column), number(first_column + out.shape[1])),
        address(out),
        *(number(TYPES[out.dtype]), number(torch.get_num_threads())),
    )


def dequantize(
    matrix: TiledMatrix, dtype: torch.dtype = torch.float32, start: int = 0, stop: int | None = None
) -> Tensor:
    """Weights of rows ``start`` to ``stop`` (None: all), [stop - start, I], equal to the reference bit for bit.

    Raises:
        UsageError: The type is none of :data:`TYPES`, there are no such rows, or the library is not in use.
    """
    if dtype not in TYPES:
        raise UsageError(
            f"The C kernels do not make {dtype}.", f"Choose one of {', '.join(map(str, TYPES))}."
        )
    g = matrix.geometry
    end = g.rows if stop is None else stop
    if not 0 <= start <= end <= g.rows:
        raise UsageError(f"Rows {start} to {end} were asked for.", f"The matrix has rows 0 to {g.rows}.")
    out = empty(end - start, g.columns, dtype=dtype)
    if out.numel():
        dequantize_into(out, matrix, start)
    return out


def _check(name: str, x: Tensor, width: int, matrix: TiledMatrix, factors: StoredFactors | None) -> None:
    check(name, x, x.shape[0] * width, tuple(TYPES))
    if factors is not None:
        rank, g = factors[0].shape[0], matrix.geometry
        check("L1", factors[0], rank * g.rows, (x.dtype,))
        check("L2", factors[1], rank * g.columns, (x.dtype,))


def _level() -> str:
    return LEVELS[needed().ck_level()]


def multiplies_narrow(dtype: torch.dtype) -> bool:
    """Whether products of this type of input are made of bfloat16 weights."""
    return dtype == torch.bfloat16 and _level() == "avx512_bf16"


def dense_from(dtype: torch.dtype) -> int:
    """Tokens of a type of input from which torch multiplies slices."""
    return NARROW_FROM if multiplies_narrow(dtype) else DENSE_FROM[_level()]


def _slices(matrix: TiledMatrix) -> list[tuple[int, int]]:
    rows = max(16, _SLICE // matrix.geometry.columns // 16 * 16)
    return [
        (start, min(start + rows, matrix.geometry.rows)) for start in range(0, matrix.geometry.rows, rows)
    ]


def product(x: Tensor, matrix: TiledMatrix, factors: StoredFactors | None) -> tuple[Tensor, Tensor]:
    """``x @ (Q + L1.T @ L2).T`` and what its first half was.

    Args:
        x: [T, I] of a type in :data:`TYPES`.
        matrix: Q.
        factors: In the type of ``x``, or None.

    Returns:
        y [T, O] in the type of ``x``, and ``x @ L2.T`` in float32 [T, r] ([T, 0] without factors).

    Raises:
        UsageError: Sizes or types do not fit, or the library is not in use.
    """
    _check("x", x, matrix.geometry.columns, matrix, factors)
    x = x.contiguous()
    tokens, rank = x.shape[0], 0 if factors is None else factors[0].shape[0]
    inner = torch.empty(tokens, rank)
    y = torch.empty(tokens, matrix.geometry.rows, dtype=x.dtype)
    if tokens >= dense_from(x.dtype):
        return (_by_narrow_slices if multiplies_narrow(x.dtype) else _by_slices)(x, matrix, factors, y)
    if tokens == 0:
        return y, inner
    native, library, threads = ctypes.byref(_native(matrix)), needed(), torch.get_num_threads()
    workspace = torch.empty(library.ck_linear_floats(native, tokens, TYPES[x.dtype], threads))
    left, right = (None, None) if factors is None else (factors[0].data_ptr(), factors[1].data_ptr())
    library.ck_linear(
        *(native, x.data_ptr(), y.data_ptr(), tokens, TYPES[x.dtype], left, right, rank),
        *(inner.data_ptr(), workspace.data_ptr(), threads),
    )
    return y, inner


def _by_slices(
    x: Tensor, matrix: TiledMatrix, factors: StoredFactors | None, y: Tensor
) -> tuple[Tensor, Tensor]:
    wide = x.float()
    sums = y if y.dtype == torch.float32 else torch.empty(y.shape)
    inner = wide.new_empty(x.shape[0], 0) if factors is None else wide @ factors[1].float().T
    slices = _slices(matrix)
    workspace = torch.empty(slices[0][1], x.shape[1])
    for start, stop in slices:
        weights = workspace[: stop - start]
        dequantize_into(weights, matrix, start)
        torch.mm(wide, weights.T, out=sums[:, start:stop])
    if factors is not None:
        sums.addmm_(inner, factors[0].float())
    return (sums if sums is y else y.copy_(sums)), inner


def _by_narrow_slices(
    x: Tensor, matrix: TiledMatrix, factors: StoredFactors | None, y: Tensor
) -> tuple[Tensor, Tensor]:
    """The same in bfloat16: the low-rank part is more columns of the slices, met by its rounded half of the product."""
    columns = x.shape[1]
    inner, wide = torch.empty(x.shape[0], 0), x
    if factors is not None:
        inner = x.float() @ factors[1].float().T
        wide = torch.cat([x, inner.to(x.dtype)], dim=1)
    slices = _slices(matrix)
    workspace = torch.empty(slices[0][1], wide.shape[1], dtype=x.dtype)
    dense = workspace if factors is None else torch.empty(slices[0][1], columns, dtype=x.dtype)
    for start, stop in slices:
        weights = dense[: stop - start]
        dequantize_into(weights, matrix, start)
        if factors is not None:
            workspace[: stop - start, :columns] = weights
            workspace[: stop - start, columns:] = factors[0][:, start:stop].T
        torch.mm(wide, workspace[: stop - start].T, out=y[:, start:stop])
    return y, inner


def product_transposed(grad: Tensor, matrix: TiledMatrix, factors: StoredFactors | None) -> Tensor:
    """``grad @ (Q + L1.T @ L2)``: the gradient of :func:`product` in its input.

    Args:
        grad: [T, O] of a type in :data:`TYPES`.
        matrix: Q.
        factors: In the type of ``grad``, or None.

    Returns:
        [T, I] in the type of ``grad``.

    Raises:
        UsageError: Sizes or types do not fit, or the library is not in use.
    """
    _check("the gradient", grad, matrix.geometry.rows, matrix, factors)
    if multiplies_narrow(grad.dtype):
        return _transposed_by_narrow_slices(grad, matrix, factors)
    wide = grad.float()
    slices = _slices(matrix)
    sums = torch.zeros(grad.shape[0], matrix.geometry.columns)
    workspace = torch.empty(slices[0][1], matrix.geometry.columns)
    for start, stop in slices:
        weights = workspace[: stop - start]
        dequantize_into(weights, matrix, start)
        sums.addmm_(wide[:, start:stop], weights)
    if factors is not None:
        sums.addmm_(wide @ factors[0].float().T, factors[1].float())
    return sums.to(grad.dtype)


def _transposed_by_narrow_slices(grad: Tensor, matrix: TiledMatrix, factors: StoredFactors | None) -> Tensor:
    """In bfloat16 by slices of columns, so that no sum crosses two; the low-rank part is more rows of each."""
    rows, columns = matrix.geometry.rows, matrix.geometry.columns
    wide = grad
    if factors is not None:
        wide = torch.cat([grad, grad @ factors[0].T], dim=1)
    y = torch.empty(grad.shape[0], columns, dtype=grad.dtype)
    step = max(32, 2 * _SLICE // wide.shape[1] // 32 * 32)  # as many bytes as slices of float32
    workspace = torch.empty(wide.shape[1] * min(step, columns), dtype=grad.dtype)
    for start in range(0, columns, step):
        stop = min(start + step, columns)
        weights = workspace[: wide.shape[1] * (stop - start)].view(-1, stop - start)
        dequantize_into(weights[:rows], matrix, 0, start)
        if factors is not None:
            weights[rows:] = factors[1][:, start:stop]
        torch.mm(wide, weights, out=y[:, start:stop])
    return y
