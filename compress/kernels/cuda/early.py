"""Launches on devices of compute capability 9.0 on, which may begin before the kernel ahead of them has ended.

A launch may read weights while the kernel before it in the stream still runs, if they are settled: that kernel is not
the one that wrote them, because a launch of ours has been between, one that waited. Tensors say by their version
counters that they were written; those made in inference mode have none, and are never settled. In a CUDA graph, what
was used outside of it before is settled as well: the graph begins after that was written. Writing that no counter shows
is for :func:`forget`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from compress.kernels.cuda.launch import Kernel, launch, starts_early
from compress.kernels.packed import TiledMatrix

SHARED = 227 << 10
"""Bytes of shared memory of a block."""
_MOST_BYTES = 1 << 32
"""Bytes of codes from which the kernels' offsets would not do."""
_SETTLED = "_compress_settled"
"""Attribute of a storage: by place, stream and whether it was captured, the version that a launch waited for."""

STREAMS, EARLY = True, True
"""For comparisons: whether products are computed by such kernels; whether launches begin early."""


@cache
def _able(index: int) -> bool:
    properties = torch.cuda.get_device_properties(index)
    return properties.major >= 9 and getattr(properties, "shared_memory_per_block_optin", 0) >= SHARED


def settled(tensors: Sequence[Tensor], stream: int, captured: bool) -> bool:
    """Whether the kernel before the next launch in a stream, which may be captured, cannot have written the tensors."""
    for tensor in tensors:
        seen = getattr(tensor.untyped_storage(), _SETTLED, None)
        if seen is None or tensor.is_inference():
            return False
        place, version = tensor.data_ptr(), tensor._version
        if seen.get((place, stream, captured)) != version and not (
            captured
            and version in [v for (at, _, within), v in list(seen.items()) if at == place and not within]
        ):
            return False
    return True


def versions(tensors: Sequence[Tensor]) -> list[int | None]:
    """Those of the values that tensors have now; None where a tensor has none."""
    return [None if tensor.is_inference() else tensor._version for tensor in tensors]


def settle(tensors: Sequence[Tensor], found: Sequence[int | None], stream: int, captured: bool) -> None:
    """Note that a launch that waits has been made in a stream, when tensors had these versions."""
    for tensor, version in zip(tensors, found, strict=True):
        if version is not None:
            storage = tensor.untyped_storage()
            if not hasattr(storage, _SETTLED):
                setattr(storage, _SETTLED, {})
            getattr(storage, _SETTLED)[tensor.data_ptr(), stream, captured] = version


def forget(tensor: Tensor) -> None:
    """Have the next launch that reads a tensor wait: it was written in a way that its version does not show.

    Such ways are writing to ``tensor.data``, kernels of others that are given its address, and the replay of a CUDA
    graph that writes it.
    """
    storage = tensor.untyped_storage()
    if hasattr(storage, _SETTLED):
        delattr(storage, _SETTLED)


def streams(index: int, matrix: TiledMatrix) -> bool:
    """Whether a CUDA device has what the kernels need, and a matrix lies as they copy it."""
    aligned = matrix.codes.data_ptr() % 16 == 0 and matrix.scale_codes.data_ptr() % 4 == 0
    return STREAMS and aligned and matrix.codes.nbytes < _MOST_BYTES and _able(index)


def launch_early(
    index: int,
    found: Kernel,
    grid: tuple[int, int, int],
    threads: int,
    arguments: Sequence[Any],
    matrix: TiledMatrix,
    factors: Sequence[Tensor] = (),
    *,
    waits: bool = False,
) -> None:
    """As :func:`compress.kernels.cuda.launch.launch`; early where the weights that it reads are settled.

    Args:
        index: The device's, which is the current one.
        found: The kernel.
        grid: Blocks.
        threads: Of a block.
        arguments: ctypes values, in the order of its parameters.
        matrix: It reads.
        factors: It reads.
        waits: Never early: something else that it reads at its start has just been written.

    Raises:
        CompressError: The driver refuses.
    """
    weights = [matrix.codes, matrix.scale_codes, matrix.steps, matrix.offset, matrix.table, *factors]
    stream = torch.cuda.current_stream(index).cuda_stream
    captured = torch.cuda.is_current_stream_capturing()
    now = versions(weights)
    early = EARLY and not waits and starts_early() and settled(weights, stream, captured)
    launch(index, found, grid, threads, arguments, early=early)
    if not early:
        settle(weights, now, stream, captured)
