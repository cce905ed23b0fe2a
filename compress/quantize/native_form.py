"""A quantized matrix in the layout of the C kernels, and back."""

from __future__ import annotations

from dataclasses import dataclass

from compress.kernels.native_product import StoredFactors
from compress.kernels.packed import Geometry, TiledMatrix, tile
from compress.quantize.blockwise import QuantizedTensor
from compress.quantize.config import QuantConfig
from compress.quantize.normal_float import normal_float_grid


@dataclass(slots=True, kw_only=True)
class NativeForm:
    """What the C kernels compute on for one layer.

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
    """A stored matrix in the layout of the C kernels.

    Raises:
        UsageError: The C library is not in use.
    """
    table = quantized.table
    if table is None:
        table = normal_float_grid(quantized.config.bits, quantized.codes.device).table
    return tile(
        geometry(quantized.shape, quantized.config),
        codes=quantized.codes,
        scale_codes=quantized.scale_codes,
        scale_max=quantized.scale_max,
        offset=quantized.offset,
        table=table,
    )
