"""Kernels of the products with few tokens: partial sums of one share of the terms, and their sum in order.

Shapes: T tokens, O out, I in, N blocks in a row, r rank, S shares of the terms ("splits").
"""

from __future__ import annotations

import triton
import triton.language as tl

from compress.kernels.triton.decode import looked_up, rounded, scaled, scales_of, times, words_of


@triton.jit
def _put(at, sums, token, tokens, place, places, INTERPRETED: tl.constexpr):
    """Store [place, token] sums as [T, places]."""
    offsets = token[None, :].to(tl.int64) * places + place[:, None]
    there = (token[None, :] < tokens) & (place[:, None] < places)
    tl.store(at + offsets, rounded(sums, at.dtype.element_ty, INTERPRETED), mask=there)


@triton.jit
def _inner(
    factor, x, at, first, tokens, rank, width, begin, end, RANKS: tl.constexpr, DEPTH: tl.constexpr,
    TOKENS: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """``x @ factor.T`` of columns ``begin`` to ``end``, for RANKS rows of the factor from ``first`` on."""
    row = first + tl.arange(0, RANKS)
    token = tl.program_id(2) * TOKENS + tl.arange(0, TOKENS)
    sums = tl.zeros((RANKS, TOKENS), tl.float32)
    for start in range(begin, end, DEPTH):
        column = start + tl.arange(0, DEPTH)
        there = column < end
        left = tl.load(
            factor + row[:, None] * width + column[None, :],
            mask=(row < rank)[:, None] & there[None, :],
            other=0.0,
        )
        right = tl.load(
            x + token[None, :].to(tl.int64) * width + column[:, None],
            mask=(token < tokens)[None, :] & there[:, None],
            other=0.0,
        )
        sums = times(left, right, sums, INTERPRETED)
    _put(at, sums, token, tokens, row, rank, INTERPRETED)


@triton.jit
def _inputs(x, token, tokens, place, places, EVEN: tl.constexpr):
    """Tokens' inputs at some places, [place, token]; 0 where nothing is there. EVEN: every place is there."""
    there = (token < tokens)[None, :]
    if not EVEN:
        there = there & (place < places)[:, None]
    return tl.load(x + token[None, :].to(tl.int64) * places + place[:, None], mask=there, other=0.0)


@triton.jit
def product_part(
    part, x, codes, scale_codes, steps, offset, table, y, tokens, rows, columns, tiles, chunks, blocks, group_size,
    first_step, last_step, ROWS: tl.constexpr, CHUNKS: tl.constexpr, TOKENS: tl.constexpr, BITS: tl.constexpr,
    SCALE_BITS: tl.constexpr, BLOCK: tl.constexpr, SHIFT: tl.constexpr, EVEN: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Columns ``part * ROWS`` and the next of ``x @ Q.T``, of the terms of some steps of 32 CHUNKS columns.

    Codes and inputs of the next step are on their way while one step is computed. Where all columns of a step lie in
    one block, the scale follows the dot product.
    """
    DEPTH: tl.constexpr = CHUNKS * 32
    row = part * ROWS + tl.arange(0, ROWS)
    token = tl.program_id(2) * TOKENS + tl.arange(0, TOKENS)
    depth = tl.arange(0, DEPTH)
    sums = tl.zeros((ROWS, TOKENS), tl.float32)
    words, high = words_of(codes, row, tiles, chunks, first_step * CHUNKS, CHUNKS, BITS, EVEN)
    inputs = _inputs(x, token, tokens, first_step * DEPTH + depth, columns, EVEN)
    for step in range(first_step, last_step):
        ahead = tl.minimum(step + 1, last_step - 1)
        next_words, next_high = words_of(codes, row, tiles, chunks, ahead * CHUNKS, CHUNKS, BITS, EVEN)
        next_inputs = _inputs(x, token, tokens, ahead * DEPTH + depth, columns, EVEN)
        unit = looked_up(words, high, table, CHUNKS, BITS)
        if BLOCK % DEPTH == 0:
            unit = tl.reshape(rounded(unit, x.dtype.element_ty, INTERPRETED), (ROWS, DEPTH))
            scale = scales_of(
                scale_codes, steps, offset, row, step * DEPTH // BLOCK, row < rows, blocks, group_size, SCALE_BITS,
                SHIFT, EVEN,
            )  # fmt: skip
            sums += times(unit, inputs, tl.zeros((ROWS, TOKENS), tl.float32), INTERPRETED) * scale[:, None]
        else:
            weight = scaled(
                unit, scale_codes, steps, offset, row, rows, step * CHUNKS, blocks, group_size, CHUNKS, BITS,
                SCALE_BITS, BLOCK, SHIFT, EVEN,
            )  # fmt: skip
            weight = tl.reshape(rounded(weight, x.dtype.element_ty, INTERPRETED), (ROWS, DEPTH))
            sums = times(weight, inputs, sums, INTERPRETED)
        words, high, inputs = next_words, next_high, next_inputs
    _put(y, sums, token, tokens, row, rows, INTERPRETED)


@triton.jit
def member(
    part, x, codes, scale_codes, steps, offset, table, factor, y, inner, tokens, rows, columns, tiles, chunks, blocks,
    group_size, rank, parts, share, ROWS: tl.constexpr, CHUNKS: tl.constexpr, TOKENS: tl.constexpr,
    RANKS: tl.constexpr, BITS: tl.constexpr, SCALE_BITS: tl.constexpr, BLOCK: tl.constexpr, SHIFT: tl.constexpr,
    EVEN: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """One program of :func:`product_kernel`: ``parts`` parts of the rows are followed by parts of the rank."""
    split = tl.program_id(1)
    all_steps = (chunks + CHUNKS - 1) // CHUNKS
    first_step = split * share
    last_step = tl.minimum(first_step + share, all_steps)
    if part < parts:
        product_part(
            part, x, codes, scale_codes, steps, offset, table, y + split.to(tl.int64) * tokens * rows, tokens, rows,
            columns, tiles, chunks, blocks, group_size, first_step, last_step, ROWS, CHUNKS, TOKENS, BITS, SCALE_BITS,
            BLOCK, SHIFT, EVEN, INTERPRETED,
        )  # fmt: skip
    else:
        begin = first_step * CHUNKS * 32
        end = tl.minimum(last_step * CHUNKS * 32, columns)
        at = inner + split.to(tl.int64) * tokens * rank
        first = (part - parts) * RANKS
        _inner(
            factor, x, at, first, tokens, rank, columns, begin, end, RANKS, CHUNKS * 32, TOKENS, INTERPRETED
        )


@triton.jit(do_not_specialize=["tokens", "rank", "parts", "share"])
def product_kernel(
    x, codes, scale_codes, steps, offset, table, factor, y, inner, tokens, rows, columns, tiles, chunks, blocks,
    group_size, rank, parts, share, ROWS: tl.constexpr, CHUNKS: tl.constexpr, TOKENS: tl.constexpr,
    RANKS: tl.constexpr, BITS: tl.constexpr, SCALE_BITS: tl.constexpr, BLOCK: tl.constexpr, SHIFT: tl.constexpr,
    EVEN: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Grid (parts of the rows and then of the rank, S, tiles of tokens): y [S, T, O] and inner [S, T, r].

    ``share`` is the number of steps of 32 CHUNKS columns that a split takes.
    """
    member(
        tl.program_id(0), x, codes, scale_codes, steps, offset, table, factor, y, inner, tokens, rows, columns, tiles,
        chunks, blocks, group_size, rank, parts, share, ROWS, CHUNKS, TOKENS, RANKS, BITS, SCALE_BITS, BLOCK, SHIFT,
        EVEN, INTERPRETED,
    )  # fmt: skip


@triton.jit(do_not_specialize=["tokens", "rank", "parts", "share"])
def transposed_kernel(
    grad, codes, scale_codes, steps, offset, table, factor, y, inner, tokens, rows, columns, tiles, chunks, blocks,
    group_size, rank, parts, share, ROWS: tl.constexpr, CHUNKS: tl.constexpr, TOKENS: tl.constexpr,
    RANKS: tl.constexpr, BITS: tl.constexpr, SCALE_BITS: tl.constexpr, BLOCK: tl.constexpr, SHIFT: tl.constexpr,
    EVEN: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """The same tiles, summed over rows: grid (parts of the columns and then of the rank, S, tiles of tokens).

    y [S, T, I] of ``grad @ Q``; inner [S, T, r] of ``grad @ factor.T``. ``share`` counts steps of ROWS rows.
    """
    part = tl.program_id(0)
    split = tl.program_id(1)
    first_step = split * share
    last_step = tl.minimum(first_step + share, (rows + ROWS - 1) // ROWS)
    token = tl.program_id(2) * TOKENS + tl.arange(0, TOKENS)
    if part < parts:
        sums = tl.zeros((CHUNKS * 32, TOKENS), tl.float32)
        lane = tl.arange(0, ROWS)
        row = first_step * ROWS + lane
        words, high = words_of(codes, row, tiles, chunks, part * CHUNKS, CHUNKS, BITS, EVEN)
        inputs = _inputs(grad, token, tokens, row, rows, EVEN)
        for step in range(first_step, last_step):
            row = step * ROWS + lane
            ahead = tl.minimum(step + 1, last_step - 1) * ROWS + lane
            next_words, next_high = words_of(codes, ahead, tiles, chunks, part * CHUNKS, CHUNKS, BITS, EVEN)
            next_inputs = _inputs(grad, token, tokens, ahead, rows, EVEN)
            weight = scaled(
                looked_up(words, high, table, CHUNKS, BITS), scale_codes, steps, offset, row, rows, part * CHUNKS,
                blocks, group_size, CHUNKS, BITS, SCALE_BITS, BLOCK, SHIFT, EVEN,
            )  # fmt: skip
            weight = tl.reshape(rounded(weight, grad.dtype.element_ty, INTERPRETED), (ROWS, CHUNKS * 32))
            sums = times(tl.trans(weight), inputs, sums, INTERPRETED)
            words, high, inputs = next_words, next_high, next_inputs
        column = part * CHUNKS * 32 + tl.arange(0, CHUNKS * 32)
        _put(y + split.to(tl.int64) * tokens * columns, sums, token, tokens, column, columns, INTERPRETED)
    else:
        begin = first_step * ROWS
        end = tl.minimum(last_step * ROWS, rows)
        at = inner + split.to(tl.int64) * tokens * rank
        _inner(
            factor,
            grad,
            at,
            (part - parts) * RANKS,
            tokens,
            rank,
            rows,
            begin,
            end,
            RANKS,
            ROWS,
            TOKENS,
            INTERPRETED,
        )


@triton.jit
def reduce_part(
    part, partial, inner, factor, y, inner_sums, tokens, width, rank, SPLITS: tl.constexpr, WIDTH: tl.constexpr,
    TOKENS: tl.constexpr, RANKS: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Columns ``part * WIDTH`` and the next of y [T, width].

    They are partial [S, T, width] summed in order, plus inner [S, T, r] summed likewise times factor [r, width]. Part 0
    puts the sums of inner into inner_sums [T, r].
    """
    column = part * WIDTH + tl.arange(0, WIDTH)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    there = (token < tokens)[:, None] & (column < width)[None, :]
    at = token[:, None].to(tl.int64) * width + column[None, :]
    size = tl.cast(tokens, tl.int64) * width
    sums = tl.zeros((TOKENS, WIDTH), tl.float32)
    for split in range(SPLITS):
        sums += tl.load(partial + split * size + at, mask=there, other=0.0)
    for first in range(0, rank, RANKS):
        k = first + tl.arange(0, RANKS)
        held = (token < tokens)[:, None] & (k < rank)[None, :]
        low = tl.zeros((TOKENS, RANKS), tl.float32)
        for split in range(SPLITS):
            place = (split * tokens + token[:, None]).to(tl.int64) * rank + k[None, :]
            low += tl.load(inner + place, mask=held, other=0.0)
        if part == 0:
            tl.store(inner_sums + token[:, None].to(tl.int64) * rank + k[None, :], low, mask=held)
        right = tl.load(
            factor + k[:, None].to(tl.int64) * width + column[None, :],
            mask=(k < rank)[:, None] & (column < width)[None, :],
            other=0.0,
        ).to(tl.float32)
        if factor.dtype.element_ty == tl.float32:
            sums = tl.dot(low, right, sums, input_precision="ieee")
        else:  # on tensor cores: three products as exact as one of float32, for the factor is exact in TF32
            sums = tl.dot(low, right, sums, input_precision="tf32x3")
    tl.store(y + at, rounded(sums, y.dtype.element_ty, INTERPRETED), mask=there)


@triton.jit(do_not_specialize=["tokens", "rank"])
def reduce_kernel(
    partial, inner, factor, y, inner_sums, tokens, width, rank, SPLITS: tl.constexpr, WIDTH: tl.constexpr,
    TOKENS: tl.constexpr, RANKS: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Every column; grid (parts of the width, tiles of tokens)."""
    reduce_part(
        tl.program_id(0), partial, inner, factor, y, inner_sums, tokens, width, rank, SPLITS, WIDTH, TOKENS, RANKS,
        INTERPRETED,
    )  # fmt: skip
