"""Blockwise quantization to a look-up table with double-quantized scales (LQ-LoRA, arXiv 2311.12023, §3.2).

Shapes: O out, I in, N blocks in a row, B weights in a block, G second-level groups of the matrix.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from compress.errors import CompressError, UsageError
from compress.kernels import blocks as native
from compress.kernels.calling import serves_blocks
from compress.kernels.dispatch import backend
from compress.kernels.packed import scale_steps
from compress.kernels.reference import Grid, PackedMatrix
from compress.quantize.codebook import fitted_grid
from compress.quantize.config import QuantConfig
from compress.quantize.normal_float import normal_float_grid
from compress.quantize.packing import pack, unpack, unpack_at


@dataclass(frozen=True, slots=True, kw_only=True)
class Scales:
    """First-level scales as stored.

    Attributes:
        codes: uint8 [O * N], not packed.
        maxima: [G] in the configuration's scale dtype: the largest scale minus offset of each group.
        offset: float32 [1]: the smallest scale of the matrix.
    """

    codes: torch.Tensor
    maxima: torch.Tensor
    offset: torch.Tensor

    def values(self, config: QuantConfig) -> torch.Tensor:
        """The dequantized scales: offset + code * maximum / (2 ** b0 - 1), float32 [O * N]."""
        steps = scale_steps(self.maxima, config.scale_bits)
        count = self.codes.numel()
        spread = steps.repeat_interleave(config.group_size)[:count]
        above: torch.Tensor = self.codes * spread  # not addcmul, whose rounding depends on the device
        return above + self.offset


def compress_scales(absmax: torch.Tensor, config: QuantConfig) -> Scales:
    """Quantize the first-level scales of a whole matrix.

    Args:
        absmax: float32 [n], not negative, row-major over the blocks of the matrix.
        config: Gives scale bits, second-level type and group size.
    """
    offset = absmax.min().reshape(1)
    above = absmax - offset
    groups = -(-above.numel() // config.group_size)
    padded = torch.nn.functional.pad(above, (0, groups * config.group_size - above.numel()))
    grouped = padded.view(groups, config.group_size)
    dtype = config.torch_scale_dtype
    maxima = grouped.amax(1).clamp(max=torch.finfo(dtype).max).to(dtype)
    levels = 2**config.scale_bits - 1
    steps = scale_steps(maxima, config.scale_bits)
    divisors = torch.where(steps > 0, steps, torch.inf)[:, None]
    codes = (grouped / divisors).round().clamp(max=levels).to(torch.uint8)
    return Scales(codes=codes.view(-1)[: above.numel()], maxima=maxima, offset=offset)


def row_blocks(weight: torch.Tensor, block_size: int) -> torch.Tensor:
    """The blocks of a matrix [O, I] in row-major order, float32 [O * N, B]; rows are padded with zeros."""
    short = -weight.shape[1] % block_size
    wide = weight.detach().float()
    if short:
        wide = torch.nn.functional.pad(wide, (0, short))
    return wide.contiguous().view(-1, block_size)


def _checked(weight: torch.Tensor) -> torch.Tensor:
    if weight.dim() != 2 or weight.numel() == 0 or not weight.is_floating_point():
        raise UsageError(
            f"A {weight.dtype} tensor of shape {tuple(weight.shape)} cannot be quantized.",
            "Pass a floating-point matrix [out, in] with at least one weight.",
        )
    return weight


def _scaled(weight: torch.Tensor, config: QuantConfig) -> tuple[Scales, Grid]:
    """First-level scales and table of a matrix."""
    wide = _checked(weight).detach().float()
    if serves_blocks(weight):
        ranges = native.block_maxima(wide, config.block_size).view(-1)
    else:
        ranges = row_blocks(wide, config.block_size).abs().amax(1)
    if not bool(ranges.isfinite().all()):
        raise CompressError(
            "The matrix to be quantized holds a value that is not finite.",
            "Check the checkpoint or the training that produced it.",
        )
    grid = normal_float_grid(config.bits, weight.device)
    if config.codebook == "learned":
        blocks = row_blocks(wide, config.block_size)
        grid, factor = fitted_grid(blocks, ranges, torch.ones_like(blocks[:1]), grid)
        ranges = factor * ranges
    return compress_scales(ranges, config), grid


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedTensor:
    """A matrix [O, I] as it is stored.

    Attributes:
        shape: (O, I).
        config: How it was quantized.
        codes: uint8 1-D, packed; rows padded to whole blocks.
        scale_codes: uint8 1-D, packed.
        scale_max: [G] in the configuration's scale dtype.
        offset: float32 [1].
        table: float32 [2 ** bits] of a learned codebook, else None.
    """

    shape: tuple[int, int]
    config: QuantConfig
    codes: torch.Tensor
    scale_codes: torch.Tensor
    scale_max: torch.Tensor
    offset: torch.Tensor
    table: torch.Tensor | None = None

    def tensors(self) -> dict[str, torch.Tensor]:
        """The stored tensors by name; their bytes are ``config.storage_bytes(shape)``."""
        return {
            "codes": self.codes,
            "scale_codes": self.scale_codes,
            "scale_max": self.scale_max,
            "offset": self.offset,
            **({} if self.table is None else {"table": self.table}),
        }

    @property
    def storage_bits(self) -> int:
        """Stored bits: codes with row padding, both scale levels, offset, own table."""
        return self.config.storage_bits(self.shape)

    def packed(self) -> PackedMatrix:
        """The kernels' view: packed codes and dequantized scales."""
        blocks = self.config.blocks(self.shape)
        scales = Scales(
            codes=unpack(self.scale_codes, self.config.scale_bits, blocks),
            maxima=self.scale_max,
            offset=self.offset,
        )
        return PackedMatrix(
            codes=self.codes,
            scales=scales.values(self.config).view(self.shape[0], -1),
            table=self.lookup_table(),
            bits=self.config.bits,
            block_size=self.config.block_size,
            rows=self.shape[0],
            columns=self.shape[1],
        )

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weights [O, I]: computed in float32, then cast."""
        return backend().dequantize(self.packed(), dtype, 0, None)

    def rows(self, index: torch.Tensor) -> torch.Tensor:
        """Some rows of the weights, ``dequantize()[index]`` bit for bit, without unpacking the others.

        Args:
            index: Row numbers, int64, any shape [...].

        Returns:
            float32 [..., I].
        """
        return picked_rows(self, index, index)

    def lookup_table(self) -> torch.Tensor:
        """The table that codes point into, float32 [2 ** bits]."""
        if self.table is not None:
            return self.table
        return normal_float_grid(self.config.bits, self.codes.device).table

    def dequantize_rows(self, start: int, stop: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Rows ``start`` to ``stop`` of the weights, [stop - start, I]."""
        return backend().dequantize(self.packed(), dtype, start, stop)


def picked_rows(part: QuantizedTensor, local: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Rows of a matrix of which only some lie in ``part``, float32 [..., I].

    Args:
        part: Codes and scale codes of those that are there; all second-level scales of the whole matrix.
        local: Where the wanted rows lie in ``part``, int64 [...].
        index: Their numbers in the whole matrix, which say the second-level scales.
    """
    config, count = part.config, part.config.blocks(part.shape)
    per_row = count // part.shape[0]
    across = torch.arange(per_row, device=index.device)
    block = local[..., None] * per_row + across
    group = (index[..., None] * per_row + across) // config.group_size
    steps = scale_steps(part.scale_max, config.scale_bits)
    scales = unpack_at(part.scale_codes, config.scale_bits, count, block) * steps[group]
    scales += part.offset
    at = block[..., None] * config.block_size + torch.arange(config.block_size, device=index.device)
    codes = unpack_at(part.codes, config.bits, count * config.block_size, at)
    values: torch.Tensor = part.lookup_table()[codes.to(torch.int32)] * scales[..., None]
    return values.flatten(-2)[..., : part.shape[1]]


def quantize_blockwise(weight: torch.Tensor, config: QuantConfig) -> QuantizedTensor:
    """Quantize a matrix.

    A block's weights are divided by its *dequantized* scale and rounded to the nearest table entry. Blocks
    never cross rows. All arithmetic is float32. A learned codebook is fitted to the matrix first.

    Args:
        weight: [O, I], any floating type.
        config: The grid and its scales.

    Raises:
        UsageError: The tensor is not a floating-point matrix or is empty.
        CompressError: A weight is not finite.
    """
    scales, grid = _scaled(weight, config)
    shape, values = (weight.shape[0], weight.shape[1]), scales.values(config)
    if serves_blocks(weight):
        by_row = values.view(shape[0], -1)
        packed = native.packed_codes(
            weight.detach().float(), by_row, config.block_size, grid.table, config.bits
        )
    else:
        blocks = row_blocks(weight, config.block_size)
        packed = pack(backend("torch").quantize_blocks(blocks, values, grid), config.bits)
    return _stored(packed, scales, grid, shape, config)


def stored(
    codes: torch.Tensor, scales: Scales, grid: Grid, shape: tuple[int, int], config: QuantConfig
) -> QuantizedTensor:
    """Pack what was found for a matrix [O, I].

    Args:
        codes: uint8 [O * N, B], rows padded to whole blocks.
        scales: First-level scales as stored.
        grid: The table; kept where the configuration has its own.
        shape: (O, I).
        config: How it was quantized.
    """
    return _stored(pack(codes, config.bits), scales, grid, shape, config)


def _stored(
    packed: torch.Tensor, scales: Scales, grid: Grid, shape: tuple[int, int], config: QuantConfig
) -> QuantizedTensor:
    return QuantizedTensor(
        shape=shape,
        config=config,
        codes=packed,
        scale_codes=pack(scales.codes, config.scale_bits),
        scale_max=scales.maxima,
        offset=scales.offset,
        table=grid.table if config.codebook == "learned" else None,
    )


def quantize_dequantize(weight: torch.Tensor, config: QuantConfig) -> torch.Tensor:
    """``quantize_blockwise(weight, config).dequantize()`` bit for bit, without packing; float32 [O, I]."""
    scales, grid = _scaled(weight, config)
    rows, columns = weight.shape
    spread = scales.values(config)
    if serves_blocks(weight):
        by_row = spread.view(rows, -1)
        return native.rounded_values(weight.detach().float(), by_row, config.block_size, grid.table)
    codes = backend("torch").quantize_blocks(row_blocks(weight, config.block_size), spread, grid)
    values = grid.table.index_select(0, codes.view(-1).to(torch.int32)).view(codes.shape)
    values *= spread[:, None]
    return values.view(rows, -1)[:, :columns].contiguous()
