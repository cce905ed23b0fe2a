"""Products of few tokens on devices of compute capability 9.0 on: codes stream through shared memory, launches overlap.

A launch may begin while the kernel before it in the stream still runs, and read weights meanwhile, if they are settled:
that kernel is not the one that wrote them, because a launch of ours has been between, one that waited. Tensors say by
their version counters that they were written; those made in inference mode have none, and are never settled. In a CUDA
graph, what was used outside of it before is settled as well: the graph begins after that was written.

Shapes: O out, I in, T tokens, r rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from compress.kernels.cuda.launch import address, clusters, integer, kernel, launch, native, starts_early
from compress.kernels.cuda.shapes import CHUNKS_OF, STAGE, even, group_shift
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

_MOST_TILES, _MOST_OF_PAIR = 6, 15
"""That a block takes at once; that a pair has, for the room of their sums."""
_PAIRS_FROM = 1 << 16
"""Inputs, tokens times columns, of which half to a block should save more than adding two blocks' sums costs."""

STREAMS, STREAMS_FACTORS, EARLY, PAIRS = True, True, True, True
"""For comparisons: whether products, and those with factors, are computed here; whether launches begin early; whether
blocks are paired."""


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
def _clusters(index: int, instance: str, cluster: int) -> int:
    """Clusters of an instance that run at the same time."""
    return clusters(index, kernel(index, "streamed.cu", instance, SHARED), 32 * _WARPS, cluster)


@dataclass(frozen=True, slots=True)
class Plan:
    """How a product is cut.

    Attributes:
        instance: Of the kernel.
        blocks: Of the launch; none where the device runs no cluster of them.
        cluster: Blocks of a cluster.
    """

    instance: str
    blocks: int
    cluster: int


def _cut(most: int, g: Geometry, tokens: int, rank: int, paired: bool) -> tuple[Plan, int]:
    """For at most so many blocks; and the tiles that a block has at most."""
    team = 2 if paired else 1
    cluster = CLUSTER if rank else team
    blocks = min(most // cluster * cluster, -(-g.tiles * team // cluster) * cluster)
    each = -(-g.tiles // (blocks // team))
    at_once = next((some for some in (2, 4) if each <= some), _MOST_TILES)
    sizes = f"{g.bits}, {g.scale_bits}, {-(-tokens // 8)}, {at_once}, {_WARPS}, {CHUNKS_OF[g.block_size]}"
    flags = ", ".join(str(flag).lower() for flag in (even(g, 1), rank > 0, paired))
    return Plan(f"streamed<{sizes}, {flags}>", blocks, cluster), each


@cache
def plan(index: int, g: Geometry, tokens: int, rank: int, pairs: bool) -> Plan:
    """The plan of a product on a device that is the current one.

    Every block, or pair of blocks, has consecutive tiles, some have one more, and takes 2, 4 or 6 of them at a time: as
    few as will do, because their sums are in registers.
    """
    most = torch.cuda.get_device_properties(index).multi_processor_count
    wide = tokens * g.columns >= _PAIRS_FROM and g.chunks > STAGE * _WARPS
    for paired in (True, False) if pairs and wide else (False,):
        found, each = _cut(most, g, tokens, rank, paired)
        if found.cluster > 1:
            running = found.cluster * _clusters(index, found.instance, found.cluster)
            if running < found.blocks:
                found, each = _cut(running, g, tokens, rank, paired) if running else (Plan("", 0, 0), 0)
        if found.blocks and not (paired and each > _MOST_OF_PAIR):
            return found
    return Plan("", 0, 0)


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
    chosen = plan(index, g, tokens, rank, PAIRS)
    if not chosen.blocks:
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
        kernel(index, "streamed.cu", chosen.instance, SHARED),
        (chosen.blocks, 1, 1),
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
        cluster=chosen.cluster,
        early=early,
    )
    if not early:
        settle(weights, stream, captured)
    return y, inner
