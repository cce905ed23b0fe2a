"""The packed layout, version 1, made on the device from the plain tensors, and back; bit for bit that of the C library.

Shapes: O out, N blocks in a row; a tile is 16 rows, a chunk 32 columns, an octet 8 columns.
"""

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from compress.kernels.packed import TILE, Geometry, TiledMatrix, check_plain, plain_bytes, scale_steps
from compress.kernels.triton.decode import scale_code
from compress.kernels.triton.launch import check, on_its_device

_PROGRAM = 1024
"""Words, octets or bytes that a program makes."""


@triton.jit
def _plain_bytes(plain, at, there, COUNT: tl.constexpr):
    """COUNT bytes from ``at`` on as one number, the first lowest."""
    word = tl.load(plain + at, mask=there, other=0).to(tl.int32)
    for i in tl.static_range(1, COUNT):
        word = word | (tl.load(plain + at + i, mask=there, other=0).to(tl.int32) << (8 * i))
    return word


@triton.jit
def _spread_pairs(x):
    """Eight pairs of bits, one into each nibble."""
    x = (x | (x << 8)) & 0x00FF00FF
    x = (x | (x << 4)) & 0x0F0F0F0F
    return (x | (x << 2)) & 0x33333333


@triton.jit
def _gather_pairs(x):
    x = x & 0x33333333
    x = (x | (x >> 2)) & 0x0F0F0F0F
    x = (x | (x >> 4)) & 0x00FF00FF
    return (x | (x >> 8)) & 0xFFFF


@triton.jit
def _spread_bits(x):
    """Eight bits, one into each nibble."""
    x = (x | (x << 12)) & 0x000F000F
    x = (x | (x << 6)) & 0x03030303
    return (x | (x << 3)) & 0x11111111


@triton.jit
def _gather_bits(x):
    x = x & 0x11111111
    x = (x | (x >> 3)) & 0x03030303
    x = (x | (x >> 6)) & 0x000F000F
    return (x | (x >> 12)) & 0xFF


@triton.jit
def tile_codes_kernel(plain, codes, rows, chunks, octets, high, BITS: tl.constexpr, PROGRAM: tl.constexpr):
    """Words of tiled codes, in their order; ``octets`` are those of a row, ``high`` is where the high plane begins."""
    word = tl.program_id(0).to(tl.int64) * PROGRAM + tl.arange(0, PROGRAM)
    vector = (word // 16) % BITS
    chunk = (word // (16 * BITS)) % chunks
    row = word // (16 * BITS * chunks) * 16 + word % 16
    held = row < rows
    first = row * octets + chunk * 4
    if BITS == 4:
        there = held & (chunk * 4 + vector < octets)
        value = _plain_bytes(plain, 4 * (first + vector), there, 4)
    elif BITS == 8:
        there = held & (chunk * 4 + vector // 2 < octets)
        value = _plain_bytes(plain, 8 * first + 4 * vector, there, 4)
    else:
        value = tl.zeros((PROGRAM,), tl.int32)
        for half in tl.static_range(2):
            octet = 2 * vector + half
            there = held & (vector < 2) & (chunk * 4 + octet < octets)
            value = value | (_spread_pairs(_plain_bytes(plain, 2 * (first + octet), there, 2)) << (2 * half))
        if BITS == 3:
            for octet in tl.static_range(4):
                there = held & (vector == 2) & (chunk * 4 + octet < octets)
                value = value | (_spread_bits(_plain_bytes(plain + high, first + octet, there, 1)) << octet)
    tl.store(codes + word, value, mask=row < (rows + 15) // 16 * 16)


@triton.jit
def plain_codes_kernel(codes, plain, rows, chunks, octets, high, BITS: tl.constexpr, PROGRAM: tl.constexpr):
    """Octets of plain codes, in their order."""
    at = tl.program_id(0).to(tl.int64) * PROGRAM + tl.arange(0, PROGRAM)
    row = at // octets
    octet = at % octets
    there = row < rows
    q = octet % 4
    base = codes + ((row // 16) * chunks + octet // 4) * (16 * BITS) + row % 16
    if BITS == 4:
        word = tl.load(base + q * 16, mask=there, other=0)
        for i in tl.static_range(4):
            tl.store(plain + 4 * at + i, ((word >> (8 * i)) & 255).to(tl.uint8), mask=there)
    elif BITS == 8:
        for half in tl.static_range(2):
            word = tl.load(base + (2 * q + half) * 16, mask=there, other=0)
            for i in tl.static_range(4):
                tl.store(plain + 8 * at + 4 * half + i, ((word >> (8 * i)) & 255).to(tl.uint8), mask=there)
    else:
        word = _gather_pairs(tl.load(base + q // 2 * 16, mask=there, other=0) >> (2 * (q % 2)))
        tl.store(plain + 2 * at, (word & 255).to(tl.uint8), mask=there)
        tl.store(plain + 2 * at + 1, (word >> 8).to(tl.uint8), mask=there)
        if BITS == 3:
            bits = _gather_bits(tl.load(base + 32, mask=there, other=0) >> q)
            tl.store(plain + high + at, bits.to(tl.uint8), mask=there)


@triton.jit
def tile_scales_kernel(plain, tiled, rows, blocks, high, SCALE_BITS: tl.constexpr, PROGRAM: tl.constexpr):
    """Bytes of tiled scale codes, in their order."""
    byte = tl.program_id(0).to(tl.int64) * PROGRAM + tl.arange(0, PROGRAM)
    place = byte % (2 * SCALE_BITS)
    block = byte // (2 * SCALE_BITS) % blocks
    first = byte // (2 * SCALE_BITS * blocks) * 16
    value = tl.zeros((PROGRAM,), tl.int32)
    if SCALE_BITS == 3:
        for i in tl.static_range(4):
            row = first + place * 4 + i
            at = row * blocks + block
            low = tl.load(plain + at // 4, mask=(place < 4) & (row < rows), other=0).to(tl.int32)
            value = value | (((low >> (2 * (at % 4)).to(tl.int32)) & 3) << (2 * i))
        for i in tl.static_range(8):
            row = first + (place - 4) * 8 + i
            at = row * blocks + block
            bit = tl.load(plain + high + at // 8, mask=(place >= 4) & (row < rows), other=0).to(tl.int32)
            value = value | (((bit >> (at % 8).to(tl.int32)) & 1) << i)
    else:
        PER: tl.constexpr = 8 // SCALE_BITS
        for i in tl.static_range(PER):
            row = first + place * PER + i
            at = row * blocks + block
            code = tl.load(plain + at // PER, mask=row < rows, other=0).to(tl.int32)
            code = (code >> (SCALE_BITS * (at % PER)).to(tl.int32)) & (2**SCALE_BITS - 1)
            value = value | (code << (SCALE_BITS * i))
    tl.store(tiled + byte, value.to(tl.uint8), mask=first < rows)


@triton.jit
def plain_scales_kernel(
    tiled,
    plain,
    rows,
    blocks,
    count,
    first_bit,
    SCALE_BITS: tl.constexpr,
    WIDTH: tl.constexpr,
    PROGRAM: tl.constexpr,
):
    """Bytes of one plane of plain scale codes: WIDTH bits of each from ``first_bit`` on; ``count`` codes in all."""
    PER: tl.constexpr = 8 // WIDTH
    byte = tl.program_id(0).to(tl.int64) * PROGRAM + tl.arange(0, PROGRAM)
    value = tl.zeros((PROGRAM,), tl.int32)
    for i in tl.static_range(PER):
        at = byte * PER + i
        code = scale_code(tiled, at // blocks, at % blocks, at < count, blocks, SCALE_BITS, False)
        value = value | (((code >> first_bit) & (2**WIDTH - 1)) << (WIDTH * i))
    tl.store(plain + byte, value.to(tl.uint8), mask=byte * PER < count)


def _programs(count: int) -> tuple[int]:
    return (-(-count // _PROGRAM),)


@on_its_device
def tile(
    geometry: Geometry,
    *,
    codes: Tensor,
    scale_codes: Tensor,
    scale_max: Tensor,
    offset: Tensor,
    table: Tensor,
) -> TiledMatrix:
    """As :func:`compress.kernels.packed.tile`, of tensors on a device that the kernels run on.

    Raises:
        UsageError: A tensor is not what the sizes ask for, or no kernel runs there.
    """
    g = geometry
    check_plain(
        partial(check, device=codes.device),
        g,
        codes=codes,
        scale_codes=scale_codes,
        scale_max=scale_max,
        offset=offset,
        table=table,
    )
    tiled = torch.empty(g.tiles, g.chunks, g.bits, TILE, dtype=torch.int32, device=codes.device)
    scales = torch.empty(g.tiles, g.blocks, 2 * g.scale_bits, dtype=torch.uint8, device=codes.device)
    octets = g.blocks * g.block_size // 8
    tile_codes_kernel[_programs(tiled.numel())](
        codes.contiguous(),
        tiled,
        g.rows,
        g.chunks,
        octets,
        2 * octets * g.rows,
        BITS=g.bits,
        PROGRAM=_PROGRAM,
        enable_fp_fusion=False,
    )
    tile_scales_kernel[_programs(scales.numel())](
        scale_codes.contiguous(),
        scales,
        g.rows,
        g.blocks,
        -(-g.rows * g.blocks // 4),
        SCALE_BITS=g.scale_bits,
        PROGRAM=_PROGRAM,
        enable_fp_fusion=False,
    )
    return TiledMatrix(
        geometry=g,
        codes=tiled,
        scale_codes=scales,
        steps=scale_steps(scale_max, g.scale_bits),
        offset=offset.contiguous(),
        table=table.contiguous(),
    )


@on_its_device
def untile(geometry: Geometry, codes: Tensor, scale_codes: Tensor) -> tuple[Tensor, Tensor]:
    """As :func:`compress.kernels.packed.untile`, on the device.

    Raises:
        UsageError: A tensor is not what the sizes ask for, or no kernel runs there.
    """
    g, device = geometry, codes.device
    check("codes", codes, g.tiles * g.chunks * g.bits * TILE, (torch.int32,), device)
    check("scale_codes", scale_codes, g.tiles * g.blocks * 2 * g.scale_bits, (torch.uint8,), device)
    code_bytes, scale_bytes = plain_bytes(g)
    plain = torch.empty(code_bytes, dtype=torch.uint8, device=device)
    plain_scales = torch.empty(scale_bytes, dtype=torch.uint8, device=device)
    octets, count = g.blocks * g.block_size // 8, g.rows * g.blocks
    plain_codes_kernel[_programs(g.rows * octets)](
        codes.contiguous(),
        plain,
        g.rows,
        g.chunks,
        octets,
        2 * octets * g.rows,
        BITS=g.bits,
        PROGRAM=_PROGRAM,
        enable_fp_fusion=False,
    )
    begin = shift = 0
    for width in (2, 1) if g.scale_bits == 3 else (g.scale_bits,):
        end = begin + -(-count * width // 8)
        plain_scales_kernel[_programs(end - begin)](
            scale_codes.contiguous(),
            plain_scales[begin:end],
            g.rows,
            g.blocks,
            count,
            shift,
            SCALE_BITS=g.scale_bits,
            WIDTH=width,
            PROGRAM=_PROGRAM,
            enable_fp_fusion=False,
        )
        begin, shift = end, shift + width
    return plain, plain_scales
