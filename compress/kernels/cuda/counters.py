"""Counters by which the blocks of a launch find out about each other."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

import torch

from compress.kernels.cuda.launch import zeros

_SLOTS = 1 << 16
"""Counters of a pool, of which each takes 16 bytes; a megabyte."""

_left: dict[int, list[int]] = {}
_of_streams: dict[tuple[int, int], list[int]] = {}
_counting = Lock()


def _slot(index: int) -> int | None:
    """Address of counters that nobody has; None where a graph is being captured and none is left."""
    if not _left.get(index):
        if torch.cuda.is_current_stream_capturing():
            return None
        first = zeros(index, 16 * _SLOTS)
        _left[index] = list(range(first, first + 16 * _SLOTS, 16))
    return _left[index].pop()


@contextmanager
def counters(index: int) -> Iterator[int | None]:
    """Address of four int32 that are zero, for the launch on a device's current stream that is made meanwhile.

    The launch leaves them zero. Two of a stream that follow each other may overlap, so they take turns with two, in the
    order in which they are made: nobody else gets any before this launch is made. After one that failed the stream gets
    others. A launch in a CUDA graph has its own, for graphs may run beside each other. None: a graph is being captured,
    and none is left.
    """
    with _counting:
        if torch.cuda.is_current_stream_capturing():
            yield _slot(index)
            return
        key = (index, torch.cuda.current_stream(index).cuda_stream)
        pair = _of_streams.pop(key, [])
        while len(pair) < 2:
            own = _slot(index)
            assert own is not None  # nothing is captured
            pair.append(own)
        yield pair[0]
        _of_streams[key] = pair[::-1]
