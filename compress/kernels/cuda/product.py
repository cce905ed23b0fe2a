"""Products of few tokens and slices of weights by the CUDA C++ kernels, in bfloat16.

Up to 16 tokens, one launch computes everything, the low-rank part too. Beyond, float32 sums of shares of the
columns are added by a kernel of :mod:`compress.kernels.triton.product`. Every sum has a fixed order, so results do not
change from call to call.

Shapes: O out, I in, T tokens, r rank.
"""

from __future__ import annotations

import ctypes
from contextlib import nullcontext
from functools import cache

import torch
from torch import Tensor

from compress.errors import CompressError
from compress.kernels.cuda.batched import batched
from compress.kernels.cuda.counters import counters
from compress.kernels.cuda.launch import address, integer, kernel, launch, native
from compress.kernels.cuda.shapes import CHUNKS_OF, STAGE, even, group_shift
from compress.kernels.cuda.streamed import streamed
from compress.kernels.library import TRITON, wanted
from compress.kernels.packed import TILE, Geometry, TiledMatrix

StoredFactors = tuple[Tensor, Tensor]

SHARED = 128 << 10
"""Bytes of shared memory of a block: scratch, and the table of pairs from a multiple of 64 KB on."""
FEW = 16
"""Tokens up to which one launch does everything."""
SHARES = 8
"""Parts of the columns in which ``x @ L2.T`` is computed, as in ``few_tokens.cu``."""
_WARPS = 16
MOST_RANK = 16 * _WARPS
"""Of factors that one launch multiplies: a warp takes 16."""


@cache
def standing(device: int) -> tuple[bool, str]:
    """Whether the kernels serve a CUDA device at all, and why not, in words."""
    if wanted() in ("torch", TRITON):
        return False, f"COMPRESS_KERNELS asks for {wanted()}"
    properties = torch.cuda.get_device_properties(device)
    most = getattr(properties, "shared_memory_per_block_optin", 0)
    if properties.major < 8 or most < SHARED:
        return False, f"{most >> 10} KB of shared memory a block are less than {SHARED >> 10} KB"
    try:
        with torch.cuda.device(device):
            kernel(device, "dequantize.cu", "dequantize<4, 8>", 0)
    except (CompressError, OSError) as error:
        return False, str(error)
    return True, "compiled by NVRTC on first use"


def dequantizes(device: torch.device, g: Geometry, dtype: torch.dtype) -> bool:
    """Whether :func:`dequantize_rows` serves matrices of a geometry on a device."""
    if device.type != "cuda" or dtype != torch.bfloat16 or g.columns % 8 or group_shift(g) < 0:
        return False
    return standing(torch.cuda.current_device() if device.index is None else device.index)[0]


def serves(device: torch.device, g: Geometry, dtype: torch.dtype) -> bool:
    """Whether :func:`product` serves matrices of a geometry on a device.

    It takes bfloat16, blocks of 32, 64 or 128 weights, groups of a power of two of blocks, an even number of rows and a
    number of columns that 8 divides, on devices with 128 KB of shared memory a block.
    """
    return g.rows % 2 == 0 and g.block_size in CHUNKS_OF and dequantizes(device, g, dtype)


def _index(x: Tensor) -> int:
    return torch.cuda.current_device() if x.device.index is None else x.device.index


def few_tokens(x: Tensor, matrix: TiledMatrix, factors: StoredFactors | None) -> tuple[Tensor, Tensor]:
    """``x @ (Q + L1.T @ L2).T`` of at most :data:`FEW` tokens, and ``x @ L2.T`` in float32.

    Args:
        x: bfloat16 [T, I], contiguous, T from 1 on.
        matrix: Q, which :func:`serves` accepts.
        factors: (L1 [r, O], L2 [r, I]) in bfloat16, contiguous, r at most :data:`MOST_RANK`, or None.

    Raises:
        CompressError: A kernel cannot be built or launched.
    """
    found = streamed(_index(x), x, matrix, factors)
    if found is not None:
        return found
    g, tokens = matrix.geometry, x.shape[0]
    left, right = factors or (None, None)
    rank = 0 if left is None else left.shape[0]
    tiles, index = 2, _index(x)
    y = x.new_empty(tokens, g.rows)
    inner_sums = x.new_empty(tokens, rank, dtype=torch.float32)
    inner = x.new_empty(SHARES * tokens * (-(-rank // 16) * 16), dtype=torch.float32)
    whole = str(even(g, tiles)).lower()
    instance = (
        f"few_tokens<{g.bits}, {g.scale_bits}, {-(-tokens // 8)}, {tiles}, {_WARPS}, "
        f"{CHUNKS_OF[g.block_size]}, {whole}, {str(rank > 0).lower()}>"
    )
    parts = -(-g.tiles // tiles)
    programs = min(parts, torch.cuda.get_device_properties(index).multi_processor_count)
    kernel_of = kernel(index, "few_tokens.cu", instance, SHARED)
    with counters(index) if rank else nullcontext() as flags:
        own = torch.zeros(2, dtype=torch.int32, device=x.device) if rank and flags is None else None
        launch(
            index,
            kernel_of,
            (programs, 1, 1),
            32 * _WARPS,
            (
                native(matrix, group_shift(g)),
                address(x),
                address(y),
                integer(tokens),
                integer(parts),
                address(left),
                address(right),
                address(inner),
                address(inner_sums),
                integer(rank),
                ctypes.c_void_p(flags) if own is None else address(own),
            ),
            together=rank > 0,
        )
    return y, inner_sums


def more_tokens(x: Tensor, matrix: TiledMatrix) -> tuple[Tensor, Tensor | None]:
    """``x @ Q.T`` of tens of tokens.

    Args:
        x: bfloat16 [T, I], contiguous, T from 1 on.
        matrix: Q, which :func:`serves` accepts.

    Returns:
        y [T, O], not yet written where there are sums of several shares: float32 [shares, T, O], to be added in order.

    Raises:
        CompressError: A kernel cannot be built or launched.
    """
    found = batched(_index(x), x, matrix)
    if found is not None:
        return found
    g, tokens, index = matrix.geometry, x.shape[0], _index(x)
    tiles, token_tiles = 2, 4 if tokens <= 32 else 8
    across, deep = -(-g.tiles // (8 * tiles)), -(-tokens // (8 * token_tiles))
    stages = -(-g.chunks // STAGE)
    wanted = torch.cuda.get_device_properties(index).multi_processor_count // (across * deep)
    share = -(-stages // max(1, min(wanted, stages)))
    shares = -(-stages // share)
    y = x.new_empty(tokens, g.rows)
    partial = None
    if shares > 1:
        partial = x.new_empty(shares, tokens, g.rows, dtype=torch.float32)
    whole = str(even(g, 8 * tiles)).lower()
    instance = (
        f"more_tokens<{g.bits}, {g.scale_bits}, {token_tiles}, {tiles}, {CHUNKS_OF[g.block_size]}, {whole}>"
    )
    launch(
        index,
        kernel(index, "more_tokens.cu", instance, SHARED),
        (across, shares, deep),
        256,
        (
            native(matrix, group_shift(g)),
            address(x),
            address(partial),
            address(y),
            integer(tokens),
            integer(share),
        ),
    )
    return y, partial


def dequantize_rows(out: Tensor, matrix: TiledMatrix, row: int) -> None:
    """Write weights from a row on into a bfloat16 tensor [rows, I], contiguous; :func:`dequantizes` has said yes.

    Raises:
        CompressError: The kernel cannot be built or launched.
    """
    g, last = matrix.geometry, row + out.shape[0]
    if not out.numel():
        return
    launch(
        _index(out),
        kernel(_index(out), "dequantize.cu", f"dequantize<{g.bits}, {g.scale_bits}>", 0),
        (-(-g.chunks // 16), -(-last // TILE) - row // TILE, 1),
        256,
        (native(matrix, group_shift(g)), address(out), integer(row), integer(last), integer(g.block_size)),
    )
