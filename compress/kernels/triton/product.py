"""Products with a tiled matrix on a GPU: fused decoding for few tokens, dequantized slices for many.

Where the CUDA C++ kernels serve, they do the first (:mod:`compress.kernels.cuda.product`); otherwise Triton does.

Few tokens: a first kernel writes float32 sums of a share of the terms each, and those of the low-rank part's first
half with them; a second adds the shares in order, multiplies by the second half, and rounds once. The order of every
sum is fixed, so results do not change from call to call. Neither path waits for the device, and all memory comes from
torch's allocator, so both can be captured in a CUDA graph.

Shapes: O out, I in, T tokens, r rank, S shares of the terms.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from compress.errors import UsageError
from compress.kernels.cuda import product as native
from compress.kernels.packed import TiledMatrix
from compress.kernels.triton.choice import Choice, Fused, Tiles, choose
from compress.kernels.triton.dense import dequantize, product_by_slices, transposed_by_slices
from compress.kernels.triton.launch import (
    TYPES,
    arguments,
    check,
    check_matrix,
    even,
    interpreted,
    on_its_device,
)
from compress.kernels.triton.product_kernels import product_kernel, reduce_kernel, transposed_kernel

__all__ = ["dequantize", "product", "product_transposed"]

StoredFactors = tuple[Tensor, Tensor]
"""Low-rank factors in the type of the input: (L1 [r, O], L2 [r, I]), contiguous."""

REDUCED, RANKS = 64, 16
"""Columns of a program that adds shares, and terms of the low-rank part that it takes at a time: more spill."""
TOKENS = 16
"""Of a program that adds the shares of the CUDA C++ kernels."""


def _check(name: str, x: Tensor, width: int, matrix: TiledMatrix, factors: StoredFactors | None) -> None:
    check(name, x, x.shape[0] * width, TYPES, x.device)
    check_matrix(matrix, x.device)
    if factors is not None:
        rank, g = factors[0].shape[0], matrix.geometry
        check("L1", factors[0], rank * g.rows, (x.dtype,), x.device)
        check("L2", factors[1], rank * g.columns, (x.dtype,), x.device)


@on_its_device
def product(
    x: Tensor, matrix: TiledMatrix, factors: StoredFactors | None, *, choice: Choice | None = None
) -> tuple[Tensor, Tensor]:
    """``x @ (Q + L1.T @ L2).T`` and what its first half was.

    Args:
        x: [T, I], float32, bfloat16 or float16.
        matrix: Q.
        factors: In the type of ``x``, or None.
        choice: How to compute it; None: what the table says of this device, width, shape and number of tokens.

    Returns:
        y [T, O] in the type of ``x``, and ``x @ L2.T`` in float32 [T, r] ([T, 0] without factors).

    Raises:
        UsageError: Sizes, types or devices do not fit.
    """
    g = matrix.geometry
    _check("x", x, g.columns, matrix, factors)
    chosen, x = choice or choose(x.device, g, x.shape[0], x.dtype), x.contiguous()
    if isinstance(chosen, Fused):
        if not native.serves(x.device, g, x.dtype):
            raise UsageError(
                "The CUDA C++ kernels do not serve this product.", "Choose tiles or slices, or none."
            )
        if x.shape[0]:
            return _fused(_aligned(x), matrix, factors and (_aligned(factors[0]), _aligned(factors[1])))
        chosen = choose(x.device, g, x.shape[0], x.dtype, fused=False)
    if isinstance(chosen, Tiles):
        return _by_tiles(x, matrix, factors, chosen, transposed=False)
    assert not isinstance(chosen, Fused)  # it was asked not to be
    return product_by_slices(x, matrix, factors, chosen)


@on_its_device
def product_transposed(
    grad: Tensor, matrix: TiledMatrix, factors: StoredFactors | None, *, choice: Choice | None = None
) -> Tensor:
    """``grad @ (Q + L1.T @ L2)``: the gradient of :func:`product` in its input.

    Args:
        grad: [T, O], float32, bfloat16 or float16.
        matrix: Q.
        factors: In the type of ``grad``, or None.
        choice: As in :func:`product`.

    Returns:
        [T, I] in the type of ``grad``.

    Raises:
        UsageError: Sizes, types or devices do not fit.
    """
    g = matrix.geometry
    _check("the gradient", grad, g.rows, matrix, factors)
    chosen = choice or choose(grad.device, g, grad.shape[0], grad.dtype, transposed=True)
    if isinstance(chosen, Tiles):
        return _by_tiles(grad.contiguous(), matrix, factors, chosen, transposed=True)[0]
    if isinstance(chosen, Fused):
        raise UsageError("The CUDA C++ kernels have no transposed product.", "Choose tiles or slices.")
    return transposed_by_slices(grad.contiguous(), matrix, factors, chosen)


def _aligned(tensor: Tensor) -> Tensor:
    """The same, at an address that vectors of 16 bytes can be read from."""
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def _fused(x: Tensor, matrix: TiledMatrix, factors: StoredFactors | None) -> tuple[Tensor, Tensor]:
    """By the CUDA C++ kernels; of more than 16 tokens, or ranks beyond theirs, torch multiplies the low-rank part."""
    rank = 0 if factors is None else factors[0].shape[0]
    if x.shape[0] <= native.FEW and rank <= native.MOST_RANK:
        return native.few_tokens(x, matrix, factors)
    y, partial = native.more_tokens(x, matrix)
    none = x.new_empty(x.shape[0], 0, dtype=torch.float32)
    if partial is not None:
        _add_shares(y, none, partial, none, None, TOKENS)
    if factors is None:
        return y, none
    with torch.autocast(x.device.type, enabled=False):
        inner = torch.mm(x, factors[1].T, out_dtype=torch.float32)
        # not addmm: for small ranks cuBLAS rounds the product once more before it adds
        return y.add_(torch.mm(inner.to(x.dtype), factors[0], out_dtype=torch.float32)), inner


def _add_shares(
    y: Tensor, inner_sums: Tensor, partial: Tensor, inner: Tensor, second: Tensor | None, token_tile: int
) -> None:
    """Shares [S, T, O] and the low-rank part's, added in order into y and inner_sums."""
    splits, tokens, width = partial.shape
    rank = inner_sums.shape[1]
    reduce_kernel[(-(-width // REDUCED), -(-tokens // token_tile))](
        partial,
        inner,
        y if second is None else second,
        y,
        inner_sums,
        tokens,
        width,
        rank,
        SPLITS=splits,
        WIDTH=REDUCED,
        TOKENS=token_tile,
        RANKS=RANKS,
        INTERPRETED=interpreted(),
        enable_fp_fusion=False,
    )


def shares(steps: int, splits: int) -> tuple[int, int]:
    """Steps of a share, and the shares that are not empty, for at most ``splits`` shares of ``steps`` steps."""
    share = -(-steps // max(1, min(splits, steps)))
    return share, -(-steps // share)


def _by_tiles(
    x: Tensor, matrix: TiledMatrix, factors: StoredFactors | None, tiles: Tiles, *, transposed: bool
) -> tuple[Tensor, Tensor]:
    g, tokens = matrix.geometry, x.shape[0]
    width = g.columns if transposed else g.rows
    first, second = (None, None) if factors is None else (factors if transposed else factors[::-1])
    rank = 0 if first is None else first.shape[0]
    y = x.new_empty(tokens, width)
    inner_sums = x.new_empty(tokens, rank, dtype=torch.float32)
    if tokens == 0:
        return y, inner_sums
    depth, across = 32 * tiles.chunks, tiles.rows
    steps, parts = -(-g.rows // across), -(-g.columns // depth)
    if not transposed:
        steps, parts = -(-g.chunks // tiles.chunks), steps
    share, splits = shares(steps, tiles.splits)
    direct = splits == 1 and rank == 0
    partial = y if direct else x.new_empty(splits, tokens, width, dtype=torch.float32)
    inner = x.new_empty(splits, tokens, rank, dtype=torch.float32)
    given: dict[str, Any] = {
        **arguments(matrix),
        "y": partial,
        "inner": inner,
        "factor": x if first is None else first,
    }
    kernel = transposed_kernel if transposed else product_kernel
    kernel[(parts + -(-rank // tiles.ranks), splits, -(-tokens // tiles.tokens))](
        x,
        tokens=tokens,
        rank=rank,
        parts=parts,
        share=share,
        ROWS=across,
        CHUNKS=tiles.chunks,
        TOKENS=tiles.tokens,
        RANKS=tiles.ranks,
        EVEN=even(g, across, tiles.chunks),
        INTERPRETED=interpreted(),
        num_warps=tiles.warps,
        num_stages=tiles.stages,
        enable_fp_fusion=False,
        **given,
    )
    if not direct:
        _add_shares(y, inner_sums, partial, inner, second, tiles.tokens)
    return y, inner_sums
