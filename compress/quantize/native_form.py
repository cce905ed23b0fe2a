"""A quantized matrix in the layout of the C and the Triton kernels, and back."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from compress.kernels.gpu import on_gpu
from compress.kernels.layout import tile, untile
from compress.kernels.native_product import StoredFactors
from compress.kernels.packed import TILE, Geometry, TiledMatrix
from compress.quantize.blockwise import QuantizedTensor, picked_rows
from compress.quantize.config import QuantConfig


@dataclass(slots=True, kw_only=True)
class NativeForm:
    """What the kernels compute on for one layer.

    Attributes:
        versions: Addresses and versions of the stored tensors when it was made.
        matrix: Q.
        factors: The dequantized factors in the type last asked for.
    """

    versions: tuple[tuple[int, int], ...]
    matrix: TiledMatrix
    factors: StoredFactors | None = None


def geometry(shape: tuple[int, int], config: QuantConfig) -> Geometry:
    """The kernels' sizes of a matrix [O, I]."""
    return Geometry(
        rows=shape[0],
        columns=shape[1],
        bits=config.bits,
        scale_bits=config.scale_bits,
        block_size=config.block_size,
        group_size=config.group_size,
    )


def tiled_form(quantized: QuantizedTensor) -> TiledMatrix:
    """A stored matrix in the layout of the kernels.

    Raises:
        UsageError: No kernels run on its device.
    """
    return tile(
        geometry(quantized.shape, quantized.config),
        codes=quantized.codes,
        scale_codes=quantized.scale_codes,
        scale_max=quantized.scale_max,
        offset=quantized.offset,
        table=quantized.lookup_table(),
    )


def rows_of_tiles(
    tiled: TiledMatrix, config: QuantConfig, scale_max: torch.Tensor, index: torch.Tensor
) -> torch.Tensor:
    """Some rows of a matrix in the kernels' layout, ``dequantize()[index]`` bit for bit; only their tiles are read.

    Args:
        tiled: The matrix.
        config: Its configuration.
        scale_max: Its second-level scales as stored.
        index: Row numbers, int64, any shape [...].

    Returns:
        float32 [..., I].
    """
    if on_gpu(tiled.codes, index):
        from compress.kernels.triton import rows

        return rows.picked_rows(tiled, index)
    tiles, place = torch.unique(index // TILE, return_inverse=True)
    sizes = replace(tiled.geometry, rows=TILE * len(tiles))
    codes, scale_codes = untile(sizes, tiled.codes[tiles].contiguous(), tiled.scale_codes[tiles].contiguous())
    part = QuantizedTensor(
        shape=(sizes.rows, sizes.columns),
        config=config,
        codes=codes,
        scale_codes=scale_codes,
        scale_max=scale_max,
        offset=tiled.offset,
        table=tiled.table,
    )
    return picked_rows(part, place * TILE + index % TILE, index)
