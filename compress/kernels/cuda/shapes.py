"""Which geometries the kernels for few tokens take, and how they are cut."""

from __future__ import annotations

from compress.kernels.packed import CHUNK, TILE, Geometry

STAGE = 4
"""Chunks that a warp takes at a time."""
CHUNKS_OF = {32: 1, 64: 2, 128: 4}
"""Chunks of a block, of the block sizes that the products take."""


def group_shift(g: Geometry) -> int:
    """The power of two that a group's blocks are, 31 for a single group, -1 for another number."""
    if g.group_size >= g.rows * g.blocks:
        return 31
    return g.group_size.bit_length() - 1 if g.group_size & (g.group_size - 1) == 0 else -1


def even(g: Geometry, tiles: int) -> bool:
    """Whether a matrix is cut into so many tiles at a time and stages without a rest."""
    whole = g.rows == TILE * g.tiles and g.columns == CHUNK * g.chunks and g.chunks % STAGE == 0
    return whole and g.tiles % tiles == 0 and g.blocks * CHUNKS_OF[g.block_size] == g.chunks
