"""Device functions: codes, scales and products of the packed layout, version 1 (docs/kernels.md).

Shapes: R rows, C chunks of 32 columns, W words of a row, P codes of a word.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def words_of(codes, rows, tiles, chunks, chunk, CHUNKS: tl.constexpr, BITS: tl.constexpr, EVEN: tl.constexpr):
    """Words of rows [R] in CHUNKS chunks from ``chunk`` on, int32 [R, W]; of 3 bits both planes' words of each octet.

    Rows and chunks that are not there give 0; EVEN: all are there.
    """
    PER_CHUNK: tl.constexpr = 4 if BITS == 3 else BITS
    w = tl.arange(0, CHUNKS * PER_CHUNK)
    at = chunk + w // PER_CHUNK
    vector = w % PER_CHUNK // 2 if BITS == 3 else w % PER_CHUNK
    base = ((rows // 16).to(tl.int64) * chunks * BITS * 16 + rows % 16)[:, None]
    place = codes + base + ((at * BITS + vector) * 16)[None, :]
    plane = codes + base + ((at * 3 + 2) * 16)[None, :]
    if EVEN:
        words = tl.load(place)
        high = tl.load(plane) if BITS == 3 else words
    else:
        there = (rows < tiles * 16)[:, None] & (at < chunks)[None, :]
        words = tl.load(place, mask=there, other=0)
        high = tl.load(plane, mask=there, other=0) if BITS == 3 else words
    return words, high


@triton.jit
def looked_up(words, high, table, CHUNKS: tl.constexpr, BITS: tl.constexpr):
    """Table entries of words, float32 [R, W, P]; column P w + p is at (w, p)."""
    P: tl.constexpr = 8 if BITS == 3 else 32 // BITS
    p = tl.arange(0, P)[None, None, :]
    if BITS == 2:
        found = (words[:, :, None] >> (2 * (p // 8) + 4 * (p % 8))) & 3
    elif BITS == 3:  # the planes are merged eight codes at a time
        octet = (tl.arange(0, CHUNKS * 4) % 4)[None, :]
        nibbles = ((words >> (2 * (octet % 2))) & 0x33333333) | (((high >> octet) & 0x11111111) << 2)
        found = (nibbles[:, :, None] >> (4 * p)) & 7
    else:
        found = (words[:, :, None] >> (BITS * p)) & (2**BITS - 1)
    return tl.load(table + found)


@triton.jit
def _byte(place, there, EVEN: tl.constexpr):
    return (tl.load(place) if EVEN else tl.load(place, mask=there, other=0)).to(tl.int32)


@triton.jit
def scale_code(scale_codes, row, block, there, blocks, SCALE_BITS: tl.constexpr, EVEN: tl.constexpr):
    """Scale codes of blocks at broadcastable rows and blocks, int32; 0 where nothing is there, EVEN: all are."""
    lane = row % 16
    base = scale_codes + ((row // 16).to(tl.int64) * blocks + block) * (2 * SCALE_BITS)
    if SCALE_BITS == 8:
        code = _byte(base + lane, there, EVEN)
    elif SCALE_BITS == 4:
        code = (_byte(base + lane // 2, there, EVEN) >> (4 * (lane % 2))) & 15
    else:
        code = (_byte(base + lane // 4, there, EVEN) >> (2 * (lane % 4))) & 3
        if SCALE_BITS == 3:
            code = code | (((_byte(base + 4 + lane // 8, there, EVEN) >> (lane % 8)) & 1) << 2)
    return code


@triton.jit
def scales_of(
    scale_codes, steps, offset, row, block, there, blocks, group_size, SCALE_BITS: tl.constexpr, SHIFT: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    """``offset + code * step`` of blocks at broadcastable rows and blocks, float32; offset where nothing is there.

    SHIFT: a group is 2 ** SHIFT blocks; below 0, ``group_size`` blocks, which takes a division.
    """
    code = scale_code(scale_codes, row, block, there, blocks, SCALE_BITS, EVEN)
    at = row * blocks + block
    group = at >> SHIFT if SHIFT >= 0 else at // group_size
    step = tl.load(steps + group) if EVEN else tl.load(steps + group, mask=there, other=0.0)
    return code.to(tl.float32) * step + tl.load(offset)


@triton.jit
def scaled(
    unit, scale_codes, steps, offset, row, rows, chunk, blocks, group_size, CHUNKS: tl.constexpr, BITS: tl.constexpr,
    SCALE_BITS: tl.constexpr, BLOCK: tl.constexpr, SHIFT: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Table entries of rows ``row`` [R] from ``chunk`` on times their scales, float32 [R, W, P]; BLOCK: block size."""
    P: tl.constexpr = 8 if BITS == 3 else 32 // BITS
    w = tl.arange(0, CHUNKS * 32 // P)
    if BLOCK % P == 0:  # all codes of a word share a scale
        block = ((chunk * 32 + w * P) // BLOCK)[None, :]
        at = row[:, None]
        there = (at < rows) & (block < blocks)
        scale = scales_of(
            scale_codes, steps, offset, at, block, there, blocks, group_size, SCALE_BITS, SHIFT, EVEN
        )
        scale = scale[:, :, None]
    else:
        block = (chunk * 32 + w[None, :, None] * P + tl.arange(0, P)[None, None, :]) // BLOCK
        at = row[:, None, None]
        there = (at < rows) & (block < blocks)
        scale = scales_of(
            scale_codes, steps, offset, at, block, there, blocks, group_size, SCALE_BITS, SHIFT, EVEN
        )
    return unit * scale


@triton.jit
def rounded(value, type: tl.constexpr, INTERPRETED: tl.constexpr):
    """Float32 values in another type, to nearest and ties to even; the interpreter's own cast to bfloat16 truncates."""
    if INTERPRETED and type == tl.bfloat16:
        bits = value.to(tl.int32, bitcast=True)
        nearest = bits + 0x7FFF + ((bits >> 16) & 1)
        value = tl.where(tl.abs(value) < float("inf"), nearest, bits).to(tl.float32, bitcast=True)
    return value.to(type)


@triton.jit
def times(left, right, sums, INTERPRETED: tl.constexpr):
    """``sums + left @ right`` in float32; the interpreter multiplies bfloat16 as if it were integers, so not there."""
    if INTERPRETED:
        left = left.to(tl.float32)
        right = right.to(tl.float32)
    return tl.dot(left, right, sums, input_precision="ieee")
