"""Packing of k-bit codes into bytes.

Codes lie in planes of 1, 2, 4 or 8 bits, the first code in the lowest bits of the first byte. Three bits are
a plane of the two low bits followed by a plane of the high bit, so that no code straddles a byte.
"""

from __future__ import annotations

import torch

from compress.errors import UsageError

_PLANES = {2: (2,), 3: (2, 1), 4: (4,), 8: (8,)}


def _planes(bits: int) -> tuple[int, ...]:
    if bits not in _PLANES:
        raise UsageError(f"Codes of {bits} bits cannot be packed.", "Choose 2, 3, 4 or 8 bits.")
    return _PLANES[bits]


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that ``count`` codes of ``bits`` bits take, each plane rounded up to whole bytes."""
    return sum(-(-count * width // 8) for width in _planes(bits))


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack codes into bytes.

    Args:
        codes: Any shape, uint8, values below ``2 ** bits``.
        bits: 2, 3, 4 or 8.

    Returns:
        uint8 [packed_bytes(codes.numel(), bits)].
    """
    flat = codes.reshape(-1)
    planes = []
    shift = 0
    for width in _planes(bits):
        plane = (flat >> shift) & ((1 << width) - 1)
        per_byte = 8 // width
        short = -plane.numel() % per_byte
        if short:
            plane = torch.cat([plane, plane.new_zeros(short)])
        columns = plane.view(-1, per_byte)
        packed = columns[:, 0].clone()
        for i in range(1, per_byte):
            packed |= columns[:, i] << (i * width)
        planes.append(packed)
        shift += width
    return planes[0] if len(planes) == 1 else torch.cat(planes)


def unpack(packed: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """Unpack ``count`` codes: the inverse of :func:`pack`.

    Args:
        packed: uint8 [packed_bytes(count, bits)].
        bits: 2, 3, 4 or 8.
        count: How many codes there are.

    Returns:
        uint8 [count].
    """
    codes = torch.zeros(count, dtype=torch.uint8, device=packed.device)
    start = shift = 0
    for width in _planes(bits):
        size = -(-count * width // 8)
        shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=packed.device)
        plane = (packed[start : start + size, None] >> shifts) & ((1 << width) - 1)
        codes |= plane.view(-1)[:count] << shift
        start += size
        shift += width
    return codes


def unpack_at(packed: torch.Tensor, bits: int, count: int, positions: torch.Tensor) -> torch.Tensor:
    """The codes at some positions of ``count`` packed ones: ``unpack(packed, bits, count)[positions]``.

    Args:
        packed: uint8 [packed_bytes(count, bits)].
        bits: 2, 3, 4 or 8.
        count: How many codes there are.
        positions: int64, any shape, below ``count``.

    Returns:
        uint8, the shape of ``positions``.
    """
    codes = torch.zeros(positions.shape, dtype=torch.uint8, device=packed.device)
    start = shift = 0
    for width in _planes(bits):
        offset = positions * width
        found = packed[start + (offset >> 3)] >> (offset & 7).to(torch.uint8)
        codes |= (found & ((1 << width) - 1)) << shift
        start += -(-count * width // 8)
        shift += width
    return codes
