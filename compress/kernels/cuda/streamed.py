"""Products of few tokens on devices of compute capability 9.0 on: codes stream through shared memory, launches overlap.

A launch may begin while the kernel before it in the stream still runs, and read weights meanwhile, if they are settled:
that kernel is not the one that wrote them, because a launch of ours has been between, one that waited. Tensors say by
their version counters that they were written; those made in inference mode have none, and are never settled. In a CUDA
graph, what was used outside of it before is settled as well: the graph begins after that was written.

Shapes: O out, I in, T tokens, r rank.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from compress.kernels.cuda.launch import address, clusters, integer, kernel, launch, native, starts_early
from compress.kernels.cuda.shapes import CHUNKS_OF, even, group_shift
from compress.kernels.packed import Geometry, TiledMatrix

StoredFactors = tuple[Tensor, Tensor]

SHARED = 227 << 10
"""Bytes of shared memory of a block."""
CLUSTER = 8
"""Blocks that compute ``x @ L2.T`` together, as in ``streamed.cu``."""
_WARPS = 16
_MOST_BYTES = 1 << 32
"""Bytes of codes from which the kernel's offsets would not do."""
_SETTLED = "_compress_settled"
"""Attribute of a storage: by stream and whether it was captured, the version of its values that a launch waited for."""

STREAMS, STREAMS_FACTORS, EARLY = True, True, True
"""For comparisons: whether products, and those with factors, are computed here; whether launches begin early."""


@cache
def streams(index: int) -> bool:
    """Whether a CUDA device has what the kernel needs."""
    properties = torch.cuda.get_device_properties(index)
    return properties.major >= 9 and getattr(properties, "shared_memory_per_block_optin", 0) >= SHARED


def settled(tensors: list[Tensor], stream: int, captured: bool) -> bool:
    """Whether the kernel before the next launch in a stream, which may be captured, cannot have written the tensors."""
    for tensor in tensors:
        seen = getattr(tensor.untyped_storage(), _SETTLED, None)
        if seen is None or tensor.is_inference():
            return False
        version = tensor._version
        if seen.get((stream, captured)) != version and not (
            captured and version in [found for (_, within), found in list(seen.items()) if not within]
        ):
            return False
    return True


def settle(tensors: list[Tensor], stream: int, captured: bool) -> None:
    """Note that a launch that waits has been made in a stream."""
    for tensor in tensors:
        if not tensor.is_inference():
            storage = tensor.untyped_storage()
            if not hasattr(storage, _SETTLED):
                setattr(storage, _SETTLED, {})
            getattr(storage, _SETTLED)[stream, captured] = tensor._version


@cache
def _in_clusters(index: int, instance: str) -> int:
    """Blocks of an instance with factors that run at the same time."""
    found = kernel(index, "streamed.cu", instance, SHARED)
    return CLUSTER * clusters(index, found, 32 * _WARPS, CLUSTER)


def _instance(g: Geometry, tokens: int, at_once: int, rank: int) -> str:
    whole, factors = str(even(g, 1)).lower(), str(rank > 0).lower()
    sizes = f"{g.bits}, {g.scale_bits}, {-(-tokens // 8)}, {at_once}, {_WARPS}, {CHUNKS_OF[g.block_size]}"
    return f"streamed<{sizes}, {whole}, {factors}>"


@cache
def plan(index: int, g: Geometry, tokens: int, rank: int) -> tuple[str, int]:
    """Instance of the kernel and number of blocks; none where the device runs no cluster of them.

    Every block has consecutive tiles, some have one more, and takes 2, 4 or 6 of them at a time: as few as will do,
    because their sums are in registers.
    """

    def cut(most: int) -> tuple[str, int]:
        blocks = min(most, -(-g.tiles // unit) * unit)
        each = -(-g.tiles // blocks)
        return _instance(g, tokens, 2 if each <= 2 else 4 if each <= 4 else 6, rank), blocks

    unit = CLUSTER if rank else 1
    instance, blocks = cut(torch.cuda.get_device_properties(index).multi_processor_count // unit * unit)
    if rank:
        running = _in_clusters(index, instance)
        if running < blocks:
            instance, blocks = cut(running) if running else ("", 0)
    return instance, blocks


def streamed(
    index: int, x: Tensor, matrix: TiledMatrix, factors: StoredFactors | None
) -> tuple[Tensor, Tensor] | None:
    """``x @ (Q + L1.T @ L2).T`` of few tokens, and ``x @ L2.T`` in float32; None where the kernel does not serve.

    Args:
        index: The device's, which is the current one.
        x: bfloat16 [T, I], contiguous, T from 1 to 16.
        matrix: Q, which :func:`compress.kernels.cuda.product.serves` accepts.
        factors: (L1 [r, O], L2 [r, I]) in bfloat16, contiguous, r at most 256, or None.

    Raises:
        CompressError: The kernel cannot be built or launched.
    """
    rank = 0 if factors is None else factors[0].shape[0]
    if not STREAMS or (rank and not STREAMS_FACTORS) or not streams(index):
        return None
    if (
        matrix.codes.data_ptr() % 16
        or matrix.scale_codes.data_ptr() % 4
        or matrix.codes.nbytes >= _MOST_BYTES
    ):
        return None
    g, tokens = matrix.geometry, x.shape[0]
    instance, blocks = plan(index, g, tokens, rank)
    if not blocks:
        return None
    left, right = factors if factors is not None and rank else (None, None)
    y = x.new_empty(tokens, g.rows)
    inner = x.new_empty(tokens, rank, dtype=torch.float32)
    weights = [matrix.codes, matrix.scale_codes, matrix.steps, matrix.offset, matrix.table]
    weights += [factor for factor in (left, right) if factor is not None]
    stream = torch.cuda.current_stream(index).cuda_stream
    captured = torch.cuda.is_current_stream_capturing()
    early = EARLY and starts_early() and settled(weights, stream, captured)
    launch(
        index,
        kernel(index, "streamed.cu", instance, SHARED),
        (blocks, 1, 1),
        32 * _WARPS,
        (
            native(matrix, group_shift(g)),
            address(x),
            address(y),
            integer(tokens),
            address(left),
            address(right),
            address(inner),
            integer(rank),
        ),
        cluster=CLUSTER if rank else 1,
        early=early,
    )
    if not early:
        settle(weights, stream, captured)
    return y, inner
