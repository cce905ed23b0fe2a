"""The packed layout of a quantized matrix, made and turned back where its tensors are."""

from __future__ import annotations

from torch import Tensor

from compress.kernels import packed
from compress.kernels.library import library
from compress.kernels.packed import Geometry, TiledMatrix


def _native(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and library() is not None


def tile(
    geometry: Geometry,
    *,
    codes: Tensor,
    scale_codes: Tensor,
    scale_max: Tensor,
    offset: Tensor,
    table: Tensor,
) -> TiledMatrix:
    """As :func:`compress.kernels.packed.tile`, by the C library on the CPU and by Triton elsewhere.

    Raises:
        UsageError: No kernel runs there, or a tensor is not what the sizes ask for.
    """
    tensors = {"codes": codes, "scale_codes": scale_codes, "scale_max": scale_max}
    if _native(codes):
        return packed.tile(geometry, **tensors, offset=offset, table=table)
    from compress.kernels.triton import layout

    return layout.tile(geometry, **tensors, offset=offset, table=table)


def untile(geometry: Geometry, codes: Tensor, scale_codes: Tensor) -> tuple[Tensor, Tensor]:
    """As :func:`compress.kernels.packed.untile`, by the C library on the CPU and by Triton elsewhere.

    Raises:
        UsageError: No kernel runs there, or a tensor is not what the sizes ask for.
    """
    if _native(codes):
        return packed.untile(geometry, codes, scale_codes)
    from compress.kernels.triton import layout

    return layout.untile(geometry, codes, scale_codes)
