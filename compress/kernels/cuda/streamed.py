"""Products of few tokens on devices of compute capability 9.0 on: codes stream through shared memory.

Shapes: O out, I in, T tokens, r rank.
"""

from __future__ import annotations

import ctypes
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from compress.kernels.cuda.counters import counters
from compress.kernels.cuda.early import SHARED, launch_early, streams
from compress.kernels.cuda.launch import address, integer, kernel, native
from compress.kernels.cuda.shapes import CHUNKS_OF, even, group_shift
from compress.kernels.packed import Geometry, TiledMatrix

StoredFactors = tuple[Tensor, Tensor]

FACTORS_UP_TO = 1
"""Tokens with factors that it takes: of 16, the kernel for older devices was faster (docs/gpu-kernels.md)."""
_SHARES_OF_ONE, _SHARES = 64, 16
"""Parts of the columns in which ``x @ L2.T`` is computed, of one token and of more."""
_WARPS, _MORE = 16, 4
"""Of a block; of the low-rank part."""
_MANY = 4
"""Most tiles at once of more than 8 tokens with factors: 6 would spill registers."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How a product is cut.

    Attributes:
        instance: Of the kernel.
        blocks: Of the launch.
        each: Tiles of a block; the last blocks have one more, where there is a rest.
    """

    instance: str
    blocks: int
    each: int


@cache
def plan(g: Geometry, tokens: int, rank: int, processors: int) -> Plan:
    """The plan of a product on a device of so many multiprocessors.

    Every block has consecutive tiles and takes 2, 4 or (with few enough sums) 6 of them at a time: as few as will do,
    because their sums are in registers.
    """
    blocks = min(g.tiles, processors)
    most, each = -(-g.tiles // blocks), g.tiles // blocks
    at_once = next((some for some in (2, 4) if most <= some), _MANY if tokens > 8 and rank else 6)
    sizes = f"{g.bits}, {g.scale_bits}, {-(-tokens // 8)}, {at_once}, {_WARPS}, {CHUNKS_OF[g.block_size]}"
    flags = ", ".join(str(flag).lower() for flag in (even(g, 1), rank > 0))
    return Plan(f"streamed<{sizes}, {flags}>", blocks, each)


def takes(tokens: int, rank: int) -> bool:
    """Whether it is the faster kernel for so many tokens and factors of a rank."""
    return rank == 0 or tokens <= FACTORS_UP_TO


def streamed(
    index: int, x: Tensor, matrix: TiledMatrix, factors: StoredFactors | None
) -> tuple[Tensor, Tensor] | None:
    """``x @ (Q + L1.T @ L2).T`` of few tokens, and ``x @ L2.T`` in float32; None where the kernel does not serve.

    Args:
        index: The device's, which is the current one.
        x: bfloat16 [T, I], contiguous, T from 1 to 16.
        matrix: Q, which :func:`compress.kernels.cuda.product.serves` accepts.
        factors: (L1 [r, O], L2 [r, I]) in bfloat16, contiguous, r at most 256, or None.

    Raises:
        CompressError: The kernel cannot be built or launched.
    """
    rank = 0 if factors is None else factors[0].shape[0]
    g, tokens = matrix.geometry, x.shape[0]
    if not takes(tokens, rank) or not streams(index, matrix):
        return None
    chosen = plan(g, tokens, rank, torch.cuda.get_device_properties(index).multi_processor_count)
    left, right = factors if factors is not None and rank else (None, None)
    y = x.new_empty(tokens, g.rows)
    inner_sums = x.new_empty(tokens, rank, dtype=torch.float32)
    shares = min(_SHARES_OF_ONE if tokens == 1 else _SHARES, g.chunks)
    inner = x.new_empty(shares * tokens * (-(-rank // 16) * 16), dtype=torch.float32)
    found = kernel(index, "streamed.cu", chosen.instance, SHARED)
    with counters(index) if rank else nullcontext() as flags:
        own = torch.zeros(4, dtype=torch.int32, device=x.device) if rank and flags is None else None
        launch_early(
            index,
            found,
            (chosen.blocks, 1, 1),
            32 * (_WARPS + (_MORE if rank else 0)),
            (
                native(matrix, group_shift(g)),
                address(x),
                address(y),
                integer(tokens),
                integer(chosen.each),
                address(left),
                address(right),
                address(inner),
                address(inner_sums),
                integer(rank),
                integer(shares),
                ctypes.c_void_p(flags) if own is None else address(own),
            ),
            matrix,
            () if left is None or right is None else (left, right),
            waits=own is not None,
        )
    return y, inner_sums
