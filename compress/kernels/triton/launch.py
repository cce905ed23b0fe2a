"""Where the Triton kernels run: on CUDA devices, and in Triton's interpreter where it is switched on.

``TRITON_INTERPRET=1`` must be set before triton is imported; then the kernels are Python, on CPU tensors and slow:
for tests, and for looking into a kernel.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from functools import cache, wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from compress.errors import UsageError
from compress.kernels.cuda.shapes import group_shift
from compress.kernels.packed import TILE, Geometry, TiledMatrix

TYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Types of inputs and results."""

MOST_WORDS = 2**31
"""Elements of a tensor from which the kernels' 32-bit offsets would not do."""


P = ParamSpec("P")
T = TypeVar("T")


@cache
def installed() -> bool:
    """Whether triton can be imported here."""
    return importlib.util.find_spec("triton") is not None


def interpreted() -> bool:
    """Whether the kernels run in the interpreter."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def runs_on(device: torch.device) -> bool:
    """Whether kernels can be launched on tensors of a device."""
    return installed() and (interpreted() if device.type == "cpu" else device.type == "cuda")


def on_its_device(function: Callable[P, T]) -> Callable[P, T]:
    """Run a function that launches kernels with the CUDA device of its first tensor or matrix as the current one."""

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        for value in (*args, *kwargs.values()):
            tensor = value.codes if isinstance(value, TiledMatrix) else value
            if isinstance(tensor, Tensor):
                if tensor.device.type != "cuda" or tensor.device.index == torch.cuda.current_device():
                    break
                with torch.cuda.device(tensor.device):
                    return function(*args, **kwargs)
        return function(*args, **kwargs)

    return run


def check(
    name: str, tensor: Tensor, count: int, types: tuple[torch.dtype, ...], device: torch.device
) -> None:
    """Refuse what would make a kernel read beyond a tensor.

    Raises:
        UsageError: The tensor is elsewhere, of another type or size, too large, or no kernel runs there.
    """
    if not runs_on(device):
        raise UsageError(
            f"The Triton kernels do not run on {device.type}.",
            "Use a CUDA device with triton installed (pip install 'compress-llm[cuda]'), or set TRITON_INTERPRET=1.",
        )
    if tensor.device != device or tensor.dtype not in types or tensor.numel() != count:
        raise UsageError(
            f"The Triton kernels got {name} as {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}.",
            f"Pass {count} elements of {' or '.join(map(str, types))} on {device}.",
        )
    if count >= MOST_WORDS:
        raise UsageError(
            f"The Triton kernels take fewer than {MOST_WORDS} elements, {name} has {count}.",
            "Set COMPRESS_KERNELS=torch.",
        )


def check_matrix(matrix: TiledMatrix, device: torch.device) -> None:
    """Refuse a matrix whose tensors are not what its sizes ask for.

    Raises:
        UsageError: As :func:`check`.
    """
    g, floats = matrix.geometry, (torch.float32,)
    check("codes", matrix.codes, g.tiles * g.chunks * g.bits * TILE, (torch.int32,), device)
    check("scale_codes", matrix.scale_codes, g.tiles * g.blocks * 2 * g.scale_bits, (torch.uint8,), device)
    check("steps", matrix.steps, -(-g.rows * g.blocks // g.group_size), floats, device)
    check("offset", matrix.offset, 1, floats, device)
    check("table", matrix.table, 2**g.bits, floats, device)
    if matrix.codes.data_ptr() % 16 or not all(
        tensor.is_contiguous() for tensor in (matrix.codes, matrix.scale_codes, matrix.steps)
    ):
        raise UsageError(
            "A matrix's tensors lie otherwise than the Triton kernels read them.",
            "Pass tensors as tile() makes them.",
        )


def even(g: Geometry, rows: int, chunks: int) -> bool:
    """Whether a matrix is cut into tiles of so many rows and chunks without a rest."""
    return g.rows % rows == 0 and g.columns == 32 * g.chunks and g.chunks % chunks == 0


def arguments(matrix: TiledMatrix) -> dict[str, Any]:
    """A matrix as the kernels take it."""
    g = matrix.geometry
    return {
        "codes": matrix.codes,
        "scale_codes": matrix.scale_codes,
        "steps": matrix.steps,
        "offset": matrix.offset,
        "table": matrix.table,
        "rows": g.rows,
        "columns": g.columns,
        "tiles": g.tiles,
        "chunks": g.chunks,
        "blocks": g.blocks,
        "group_size": min(g.group_size, g.rows * g.blocks),
        "BITS": g.bits,
        "SCALE_BITS": g.scale_bits,
        "BLOCK": g.block_size,
        "SHIFT": group_shift(g),
    }
