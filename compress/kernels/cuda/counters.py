"""Counters by which the blocks of a launch find out about each other."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import cycle
from threading import Lock

import torch

from compress.kernels.cuda.launch import zeros

_SLOTS = 1 << 16
"""Counters of a pool, of which each takes 16 bytes; a megabyte."""

_left: dict[int, list[int]] = {}
_of_streams: dict[tuple[int, int], Iterator[int]] = {}
_counting = Lock()


def _slot(index: int) -> int | None:
    """Address of counters that nobody has; None where a graph is being captured and none is left."""
    if not _left.get(index):
        if torch.cuda.is_current_stream_capturing():
            return None
        first = zeros(index, 16 * _SLOTS)
        _left[index] = list(range(first, first + 16 * _SLOTS, 16))
    return _left[index].pop()


def counters(index: int) -> int | None:
    """Address of four int32 that are zero, for a launch on a device's current stream, which leaves them so.

    Two launches of a stream that follow each other may overlap, so they take turns with two. One in a CUDA graph has
    its own, for graphs may run beside each other. None: a graph is being captured, and none is left.
    """
    with _counting:
        if torch.cuda.is_current_stream_capturing():
            return _slot(index)
        key = (index, torch.cuda.current_stream(index).cuda_stream)
        if key not in _of_streams:
            pair = [slot for slot in (_slot(index), _slot(index)) if slot is not None]
            assert len(pair) == 2  # nothing is captured
            _of_streams[key] = cycle(pair)
        return next(_of_streams[key])
