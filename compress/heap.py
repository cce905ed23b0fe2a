"""Memory that was freed and that the C library has not given back."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from functools import cache


def give_back() -> None:
    """Return freed memory to the system, where the C library can.

    The many tensors of a backward pass, all of them below the size that is mapped by itself, leave a heap that glibc
    keeps: gigabytes in which later large tensors find no place of their size.
    """
    gc.collect()
    trim = _trim()
    if trim is not None:
        trim(0)


@cache
def _trim() -> Callable[[int], int] | None:
    try:
        found: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # another C library; TypeError: Windows
        return None
    return found
