"""One launch for matrices that multiply the same input: q, k and v, or gate and up.

Small matrices fill a GPU only together, and a launch costs as much as reading megabytes. Programs of the second matrix
follow those of the first; each does what it would do in a launch of its own, so results are the same bit for bit.

Shapes: O out of a matrix, I in, T tokens, r rank, S shares of the terms.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from compress.errors import UsageError
from compress.kernels.packed import TiledMatrix
from compress.kernels.triton.choice import Tiles
from compress.kernels.triton.launch import (
    TYPES,
    arguments,
    check,
    check_matrix,
    even,
    interpreted,
    on_its_device,
)
from compress.kernels.triton.product import RANKS, REDUCED, StoredFactors, shares
from compress.kernels.triton.product_kernels import member, reduce_part

MOST = 3
"""Matrices of a group."""

_MEMBER = (
    "codes",
    "scale_codes",
    "steps",
    "offset",
    "table",
    "factor",
    "y",
    "inner",
    "rows",
    "tiles",
    "group_size",
    "rank",
    "parts",
)
_REDUCED = ("partial", "inner", "factor", "y", "inner_sums", "width", "rank")


_ANY = [
    "tokens",
    "share",
    "end0",
    "end1",
    *(f"{name}{at}" for name in ("rank", "parts") for at in range(MOST)),
]
"""What changes with the number of tokens: a kernel compiled for some of them serves all."""


@triton.jit(do_not_specialize=_ANY)
def group_kernel(
    x, tokens, columns, chunks, blocks, share, end0, end1,
    codes0, scale_codes0, steps0, offset0, table0, factor0, y0, inner0, rows0, tiles0, group_size0, rank0, parts0,
    codes1, scale_codes1, steps1, offset1, table1, factor1, y1, inner1, rows1, tiles1, group_size1, rank1, parts1,
    codes2, scale_codes2, steps2, offset2, table2, factor2, y2, inner2, rows2, tiles2, group_size2, rank2, parts2,
    ROWS: tl.constexpr, CHUNKS: tl.constexpr, TOKENS: tl.constexpr, RANKS: tl.constexpr, BITS: tl.constexpr,
    SCALE_BITS: tl.constexpr, BLOCK: tl.constexpr, SHIFT: tl.constexpr, EVEN: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """As :func:`compress.kernels.triton.product_kernels.product_kernel`; ``end0`` and ``end1`` part the matrices."""
    part = tl.program_id(0)
    if part < end0:
        member(
            part, x, codes0, scale_codes0, steps0, offset0, table0, factor0, y0, inner0, tokens, rows0, columns,
            tiles0, chunks, blocks, group_size0, rank0, parts0, share, ROWS, CHUNKS, TOKENS, RANKS, BITS,
            SCALE_BITS, BLOCK, SHIFT, EVEN, INTERPRETED,
        )  # fmt: skip
    elif part < end1:
        member(
            part - end0, x, codes1, scale_codes1, steps1, offset1, table1, factor1, y1, inner1, tokens, rows1,
            columns, tiles1, chunks, blocks, group_size1, rank1, parts1, share, ROWS, CHUNKS, TOKENS, RANKS, BITS,
            SCALE_BITS, BLOCK, SHIFT, EVEN, INTERPRETED,
        )  # fmt: skip
    else:
        member(
            part - end1, x, codes2, scale_codes2, steps2, offset2, table2, factor2, y2, inner2, tokens, rows2,
            columns, tiles2, chunks, blocks, group_size2, rank2, parts2, share, ROWS, CHUNKS, TOKENS, RANKS, BITS,
            SCALE_BITS, BLOCK, SHIFT, EVEN, INTERPRETED,
        )  # fmt: skip


@triton.jit(do_not_specialize=["tokens", "end0", "end1", "rank0", "rank1", "rank2"])
def group_reduce_kernel(
    tokens, end0, end1,
    partial0, inner0, factor0, y0, inner_sums0, width0, rank0,
    partial1, inner1, factor1, y1, inner_sums1, width1, rank1,
    partial2, inner2, factor2, y2, inner_sums2, width2, rank2,
    SPLITS: tl.constexpr, WIDTH: tl.constexpr, TOKENS: tl.constexpr, RANKS: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """As :func:`compress.kernels.triton.product_kernels.reduce_kernel`, matrix after matrix."""
    part = tl.program_id(0)
    if part < end0:
        reduce_part(
            part, partial0, inner0, factor0, y0, inner_sums0, tokens, width0, rank0, SPLITS, WIDTH, TOKENS, RANKS,
            INTERPRETED,
        )  # fmt: skip
    elif part < end1:
        reduce_part(
            part - end0, partial1, inner1, factor1, y1, inner_sums1, tokens, width1, rank1, SPLITS, WIDTH, TOKENS,
            RANKS, INTERPRETED,
        )  # fmt: skip
    else:
        reduce_part(
            part - end1, partial2, inner2, factor2, y2, inner_sums2, tokens, width2, rank2, SPLITS, WIDTH, TOKENS,
            RANKS, INTERPRETED,
        )  # fmt: skip


def groupable(matrices: Sequence[TiledMatrix]) -> bool:
    """Whether one launch can take these matrices: two or three of the same columns, widths and block size."""
    kinds = {(g.columns, g.bits, g.scale_bits, g.block_size) for g in (m.geometry for m in matrices)}
    return 2 <= len(matrices) <= MOST and len(kinds) == 1


@on_its_device
def group_product(
    x: Tensor, matrices: Sequence[TiledMatrix], factors: Sequence[StoredFactors | None], tiles: Tiles
) -> list[tuple[Tensor, Tensor]]:
    """What :func:`compress.kernels.triton.product.product` gives for each matrix, in two launches for all of them.

    Args:
        x: [T, I], float32, bfloat16 or float16.
        matrices: Two or three, as :func:`groupable` wants them.
        factors: Of each matrix, in the type of ``x``, or None.
        tiles: Sizes of a program, the same for all.

    Raises:
        UsageError: The matrices make no group, or sizes, types or devices do not fit.
    """
    if not groupable(matrices) or len(factors) != len(matrices):
        raise UsageError(
            "These matrices do not make a group.",
            "Pass two or three with the same columns, widths and block size, and factors or None for each.",
        )
    check("x", x, x.shape[0] * matrices[0].geometry.columns, TYPES, x.device)
    x, tokens, g = x.contiguous(), x.shape[0], matrices[0].geometry
    share, splits = shares(-(-g.chunks // tiles.chunks), tiles.splits)
    members: list[dict[str, Any]] = []
    for matrix, own in zip(matrices, factors, strict=True):
        check_matrix(matrix, x.device)
        members.append(_member(x, matrix, own, tiles, splits))
    if tokens:
        _launch(x, g.columns, members, tiles, share, splits)
    return [(one["y"], one["inner_sums"]) for one in members]


def _member(
    x: Tensor, matrix: TiledMatrix, factors: StoredFactors | None, tiles: Tiles, splits: int
) -> dict[str, Any]:
    """Arguments of both kernels for one matrix."""
    g, rank = matrix.geometry, 0 if factors is None else factors[0].shape[0]
    if factors is not None:
        check("L1", factors[0], rank * g.rows, (x.dtype,), x.device)
        check("L2", factors[1], rank * g.columns, (x.dtype,), x.device)
    return {
        **arguments(matrix),
        "y": x.new_empty(x.shape[0], g.rows),
        "inner_sums": x.new_empty(x.shape[0], rank, dtype=torch.float32),
        "partial": x.new_empty(splits, x.shape[0], g.rows, dtype=torch.float32),
        "inner": x.new_empty(splits, x.shape[0], rank, dtype=torch.float32),
        "left": x if factors is None else factors[0],
        "right": x if factors is None else factors[1],
        "rank": rank,
        "parts": -(-g.rows // tiles.rows),
        "rank_parts": -(-rank // tiles.ranks),
        "width": g.rows,
        "even": even(g, tiles.rows, tiles.chunks),
    }


def _launch(
    x: Tensor, columns: int, members: Sequence[dict[str, Any]], tiles: Tiles, share: int, splits: int
) -> None:
    last = members[-1]
    padded = [*members, *(last for _ in range(MOST - len(members)))]
    ends = _ends([one["parts"] + one["rank_parts"] for one in members])
    token_tiles = -(-x.shape[0] // tiles.tokens)
    given = {
        f"{name}{at}": one[{"factor": "right", "y": "partial"}.get(name, name)]
        for at, one in enumerate(padded)
        for name in _MEMBER
    }
    group_kernel[(ends[-1], splits, token_tiles)](
        x,
        tokens=x.shape[0],
        columns=columns,
        share=share,
        end0=ends[0],
        end1=ends[1],
        ROWS=tiles.rows,
        CHUNKS=tiles.chunks,
        TOKENS=tiles.tokens,
        RANKS=tiles.ranks,
        SHIFT=last["SHIFT"] if len({one["SHIFT"] for one in members}) == 1 else -1,
        EVEN=all(one["even"] for one in members),
        INTERPRETED=interpreted(),
        num_warps=tiles.warps,
        num_stages=tiles.stages,
        enable_fp_fusion=False,
        **{name: last[name] for name in ("chunks", "blocks", "BITS", "SCALE_BITS", "BLOCK")},
        **given,
    )
    ends = _ends([-(-one["width"] // REDUCED) for one in members])
    given = {
        f"{name}{at}": one[{"factor": "left"}.get(name, name)]
        for at, one in enumerate(padded)
        for name in _REDUCED
    }
    group_reduce_kernel[(ends[-1], token_tiles)](
        x.shape[0],
        end0=ends[0],
        end1=ends[1],
        SPLITS=splits,
        WIDTH=REDUCED,
        TOKENS=tiles.tokens,
        RANKS=RANKS,
        INTERPRETED=interpreted(),
        enable_fp_fusion=False,
        **given,
    )


def _ends(counts: Sequence[int]) -> tuple[int, int, int]:
    """Where the programs of the first, the second and the last matrix end."""
    first = counts[0]
    return first, first + counts[1], sum(counts)
