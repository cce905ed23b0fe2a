"""The packed layout of a quantized matrix that the C library computes on: made from the plain tensors, and back.

Shapes: O out, I in, N blocks in a row, G second-level groups; a tile is 16 rows, a chunk 32 columns. docs/kernels.md
draws the layout. The plain tensors are those of a checkpoint (docs/artifacts.md).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from compress.errors import UsageError
from compress.kernels.library import library
from compress.kernels.team import join

LAYOUT_VERSION = 1
TILE = 16
CHUNK = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Geometry:
    """Sizes of a quantized matrix.

    Attributes:
        rows: O.
        columns: I.
        bits: Width of a code: 2, 3, 4 or 8.
        scale_bits: Width of a scale's code: 2, 3, 4 or 8.
        block_size: Weights that share a scale, a multiple of 8.
        group_size: Blocks, in row-major order, that share a second-level scale.
    """

    rows: int
    columns: int
    bits: int
    scale_bits: int
    block_size: int
    group_size: int

    @property
    def blocks(self) -> int:
        """N, blocks in a row."""
        return -(-self.columns // self.block_size)

    @property
    def tiles(self) -> int:
        """Tiles of 16 rows."""
        return -(-self.rows // TILE)

    @property
    def chunks(self) -> int:
        """Chunks of 32 columns in a row."""
        return -(-self.blocks * self.block_size // CHUNK)

    def numbers(self) -> list[int]:
        """The fields, as the operations take them."""
        return [self.rows, self.columns, self.bits, self.scale_bits, self.block_size, self.group_size]


class Made(list["tuple[tuple[int, ...], NativeMatrix]"]):
    """What was made of a matrix for the library. It holds addresses, so a copy of the matrix begins without."""

    def __deepcopy__(self, memo: object) -> Made:
        return Made()

    def __reduce__(self) -> tuple[type[Made], tuple[()]]:
        return Made, ()


@dataclass(frozen=True, slots=True, kw_only=True)
class TiledMatrix:
    """A quantized matrix [O, I] in the packed layout, version 1.

    Attributes:
        geometry: Its sizes.
        codes: int32 [tiles, chunks, bits, 16].
        scale_codes: uint8 [tiles, N, 2 * scale_bits].
        steps: float32 [G], second-level scales over ``2 ** scale_bits - 1``.
        offset: float32 [1].
        table: float32 [2 ** bits].
        made: What the C library is given for it, with the addresses that this holds; at most one.
    """

    geometry: Geometry
    codes: Tensor
    scale_codes: Tensor
    steps: Tensor
    offset: Tensor
    table: Tensor
    made: Made = field(default_factory=Made, init=False, repr=False, compare=False)

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scale codes and steps."""
        return self.codes.nbytes + self.scale_codes.nbytes + self.steps.nbytes


class NativeMatrix(ctypes.Structure):
    """``ck_matrix`` of native/matrix.h; holds addresses only, the tensors must outlive it."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("codes", "scale_codes", "steps", "table", "offset")),
        *(
            (name, ctypes.c_int64)
            for name in (
                "rows",
                "columns",
                "blocks",
                "block_size",
                "group_size",
                "groups",
                "bits",
                "scale_bits",
            )
        ),
    )


def needed() -> ctypes.CDLL:
    """The C library.

    Raises:
        UsageError: It is not there, or torch was asked for.
    """
    found = library()
    if found is None:
        raise UsageError(
            "The C kernels are not in use.", "Install with a C compiler, or use backend 'torch'."
        )
    join(found)
    return found


def check(name: str, tensor: Tensor, count: int, types: tuple[torch.dtype, ...]) -> None:
    """Refuse what would make the library read beyond a tensor.

    Raises:
        UsageError: The tensor is elsewhere, of another type, or of another size.
    """
    if tensor.device.type != "cpu" or tensor.dtype not in types or tensor.numel() != count:
        raise UsageError(
            f"The C kernels got {name} as {tensor.dtype} {tuple(tensor.shape)} on {tensor.device.type}.",
            f"Pass {count} elements of {' or '.join(map(str, types))} on the cpu.",
        )


def scale_steps(scale_max: Tensor, scale_bits: int) -> Tensor:
    """Second-level scales over the largest scale code, float32, the same on every device.

    Divided by a tensor: by a number, torch multiplies with the rounded reciprocal on a GPU.
    """
    maxima = scale_max.float()
    return maxima / torch.full_like(maxima, 2**scale_bits - 1)


def plain_bytes(g: Geometry) -> tuple[int, int]:
    """Bytes of the codes and of the scale codes as a checkpoint stores them."""
    planes = {3: (2, 1)}.get(g.scale_bits, (g.scale_bits,))
    blocks = g.rows * g.blocks
    return blocks * g.block_size * g.bits // 8, sum(-(-blocks * width // 8) for width in planes)


def check_plain(
    refuse: Callable[[str, Tensor, int, tuple[torch.dtype, ...]], None], geometry: Geometry, **tensors: Tensor
) -> None:
    """Have :func:`check` or another such function look at every plain tensor of a matrix, by its name."""
    g = geometry
    code_bytes, scale_bytes = plain_bytes(g)
    for name, count, types in (
        ("codes", code_bytes, (torch.uint8,)),
        ("scale_codes", scale_bytes, (torch.uint8,)),
        ("scale_max", -(-g.rows * g.blocks // g.group_size), (torch.float32, torch.bfloat16, torch.float16)),
        ("offset", 1, (torch.float32,)),
        ("table", 2**g.bits, (torch.float32,)),
    ):
        refuse(name, tensors[name], count, types)


def _arguments(geometry: Geometry) -> tuple[ctypes.c_int64 | ctypes.c_int, ...]:
    sizes = (geometry.rows, geometry.blocks, geometry.block_size)
    widths = (geometry.bits, geometry.scale_bits, torch.get_num_threads())
    return (*map(ctypes.c_int64, sizes), *map(ctypes.c_int, widths))


def address(tensor: Tensor) -> ctypes.c_void_p:
    """Where a tensor lies."""
    return ctypes.c_void_p(tensor.data_ptr())


def tile(
    geometry: Geometry,
    *,
    codes: Tensor,
    scale_codes: Tensor,
    scale_max: Tensor,
    offset: Tensor,
    table: Tensor,
) -> TiledMatrix:
    """The packed layout of plain tensors, which stay as they are.

    Args:
        geometry: Sizes.
        codes: uint8 1-D, packed, rows padded to whole blocks.
        scale_codes: uint8 1-D, packed.
        scale_max: [G], second-level scales.
        offset: float32 [1].
        table: float32 [2 ** bits].

    Raises:
        UsageError: The C library is not in use, or a tensor is not what the sizes ask for.
    """
    g = geometry
    check_plain(
        check, g, codes=codes, scale_codes=scale_codes, scale_max=scale_max, offset=offset, table=table
    )
    tiled = torch.empty(g.tiles, g.chunks, g.bits, TILE, dtype=torch.int32)
    scales = torch.empty(g.tiles, g.blocks, 2 * g.scale_bits, dtype=torch.uint8)
    plain, plain_scales = codes.contiguous(), scale_codes.contiguous()
    needed().ck_pack(*map(address, (plain, plain_scales, tiled, scales)), *_arguments(g))
    return TiledMatrix(
        geometry=g,
        codes=tiled,
        scale_codes=scales,
        steps=scale_steps(scale_max, g.scale_bits),
        offset=offset.contiguous(),
        table=table.contiguous(),
    )


def untile(geometry: Geometry, codes: Tensor, scale_codes: Tensor) -> tuple[Tensor, Tensor]:
    """The plain codes and scale codes of a tiled matrix, byte for byte those it was made from.

    Args:
        geometry: Its sizes.
        codes: As in a :class:`TiledMatrix`.
        scale_codes: As in a :class:`TiledMatrix`.

    Raises:
        UsageError: The C library is not in use, or a tensor is not what the sizes ask for.
    """
    g = geometry
    check("codes", codes, g.tiles * g.chunks * g.bits * TILE, (torch.int32,))
    check("scale_codes", scale_codes, g.tiles * g.blocks * 2 * g.scale_bits, (torch.uint8,))
    code_bytes, scale_bytes = plain_bytes(g)
    plain = torch.empty(code_bytes, dtype=torch.uint8)
    plain_scales = torch.zeros(scale_bytes, dtype=torch.uint8)
    tiled, scales = codes.contiguous(), scale_codes.contiguous()
    needed().ck_unpack(*map(address, (plain, plain_scales, tiled, scales)), *_arguments(g))
    return plain, plain_scales
