"""Random quantized matrices for tests of the C kernels, with their weights in float64 from the plain tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from compress.kernels.native_product import NARROW_FROM
from compress.kernels.packed import Geometry, TiledMatrix, tile
from compress.quantize.packing import pack

LEVEL_BF16 = "avx512_bf16"


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A tiled matrix, and what it stands for: by the definition of docs/artifacts.md, in float32 and float64.

    ``paired`` are table entries rounded to bfloat16 times scales, in float64.
    """

    matrix: TiledMatrix
    weights: torch.Tensor
    exact: torch.Tensor
    paired: torch.Tensor


def random_case(
    rows: int,
    columns: int,
    *,
    bits: int = 4,
    scale_bits: int = 8,
    block_size: int = 16,
    group_size: int = 16,
    zero_blocks: bool = False,
    table_type: torch.dtype = torch.float32,
    seed: int = 0,
) -> Case:
    """Uniform codes and a random ascending table of values of a type; with ``zero_blocks`` many scales are 0."""
    generator = torch.Generator().manual_seed(seed)
    geometry = Geometry(
        rows=rows,
        columns=columns,
        bits=bits,
        scale_bits=scale_bits,
        block_size=block_size,
        group_size=group_size,
    )
    count = rows * geometry.blocks
    codes = torch.randint(2**bits, (rows, geometry.blocks, block_size), generator=generator)
    scale_codes = torch.randint(2**scale_bits, (count,), generator=generator)
    if zero_blocks:
        scale_codes *= torch.randint(2, (count,), generator=generator)
    scale_max = torch.rand(-(-count // group_size), generator=generator) + 0.1
    offset = torch.zeros(1) if zero_blocks else torch.rand(1, generator=generator)
    table = torch.rand(2**bits, generator=generator).mul(2).sub(1).sort().values
    table = table.to(table_type).float()
    matrix = tile(
        geometry,
        codes=pack(codes.to(torch.uint8), bits),
        scale_codes=pack(scale_codes.to(torch.uint8), scale_bits),
        scale_max=scale_max,
        offset=offset,
        table=table,
    )
    steps = scale_max / (2**scale_bits - 1)
    scales = scale_codes * steps.repeat_interleave(min(group_size, count))[:count] + offset
    wide = scales.view(rows, geometry.blocks, 1)
    return Case(
        matrix=matrix,
        weights=(table[codes] * wide).view(rows, -1)[:, :columns],
        exact=(table.double()[codes] * wide.double()).view(rows, -1)[:, :columns],
        paired=(table.bfloat16().double()[codes] * wide.double()).view(rows, -1)[:, :columns],
    )


def multiplied(case: Case, level: str, dtype: torch.dtype, tokens: int) -> torch.Tensor:
    """The weights that a product on ``level`` is defined by, float64: rounded in a way where it multiplies bfloat16."""
    if level != LEVEL_BF16 or dtype != torch.bfloat16:
        return case.exact
    return case.paired if tokens < NARROW_FROM else case.weights.bfloat16().double()


def random_input(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> torch.Tensor:
    """Standard normal values."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
