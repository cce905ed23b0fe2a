"""Products of tens of tokens on devices of compute capability 9.0 on: inputs and codes pass through shared memory.

Shapes: O out, I in, T tokens, S shares of the columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from compress.kernels.cuda.early import SHARED, launch_early, streams
from compress.kernels.cuda.launch import address, integer, kernel, native
from compress.kernels.cuda.shapes import CHUNKS_OF, STAGE, even, group_shift
from compress.kernels.packed import Geometry, TiledMatrix

_WARPS = 16
_TILES = 2 * _WARPS
"""Of a block."""
_WIDEST = 4
"""Bits of codes of which two stages fit into shared memory."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How a product is cut.

    Attributes:
        instance: Of the kernel.
        grid: Parts of the rows, shares of the columns, and of the tokens.
    """

    instance: str
    grid: tuple[int, int, int]


@cache
def plan(g: Geometry, tokens: int, processors: int) -> Plan:
    """The plan of a product on a device of so many multiprocessors: as many shares as they have blocks at a time."""
    token_tiles = 4 if tokens <= 32 else 8
    across, deep = -(-g.tiles // _TILES), -(-tokens // (8 * token_tiles))
    shares = max(1, min(processors // (across * deep), -(-g.chunks // STAGE)))
    sizes = f"{g.bits}, {g.scale_bits}, {token_tiles}, {CHUNKS_OF[g.block_size]}"
    return Plan(f"batched<{sizes}, {str(even(g, 1)).lower()}>", (across, shares, deep))


def serves(index: int, matrix: TiledMatrix) -> bool:
    """Whether :func:`batched` computes products of a matrix on a device."""
    return matrix.geometry.bits <= _WIDEST and streams(index, matrix)


def batched(index: int, x: Tensor, matrix: TiledMatrix) -> tuple[Tensor, Tensor | None] | None:
    """``x @ Q.T`` of tens of tokens; None where the kernel does not serve.

    Args:
        index: The device's, which is the current one.
        x: bfloat16 [T, I], contiguous, T from 1 on.
        matrix: Q, which :func:`compress.kernels.cuda.product.serves` accepts.

    Returns:
        y [T, O], not yet written where there are sums of several shares: float32 [S, T, O], to be added in order.

    Raises:
        CompressError: The kernel cannot be built or launched.
    """
    g, tokens = matrix.geometry, x.shape[0]
    if not serves(index, matrix):
        return None
    chosen = plan(g, tokens, torch.cuda.get_device_properties(index).multi_processor_count)
    y, partial = x.new_empty(tokens, g.rows), None
    if chosen.grid[1] > 1:
        partial = x.new_empty(chosen.grid[1], tokens, g.rows, dtype=torch.float32)
    launch_early(
        index,
        kernel(index, "batched.cu", chosen.instance, SHARED),
        chosen.grid,
        32 * _WARPS,
        (native(matrix, group_shift(g)), address(x), address(partial), address(y), integer(tokens)),
        matrix,
    )
    return y, partial
