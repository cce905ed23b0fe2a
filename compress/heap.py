"""Memory that was freed and that the C library keeps: given back now and then, or always. Both need glibc."""

from __future__ import annotations

import ctypes
from typing import Any

_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1
"""Parameters of glibc's ``mallopt``."""
_BLOCK = 1 << 20
"""Blocks of this size and more come straight from the system, and go back to it."""


def give_back() -> None:
    """Return to the system what has been freed so far.

    A backward pass leaves a heap full of holes, gigabytes that later tensors of other sizes do not fill.
    """
    trim = _function("malloc_trim")
    if trim is not None:
        trim(0)


def keep_nothing() -> None:
    """Return to the system whatever is freed from now on, where a limit could not be kept otherwise.

    Every large tensor then gets new pages, which takes time.
    """
    mallopt = _function("mallopt")
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, _BLOCK)
        mallopt(_TRIM_THRESHOLD, _BLOCK)


def _function(name: str) -> Any:
    """A function of the C library, or None."""
    try:
        return getattr(ctypes.CDLL(None), name, None)
    except (OSError, TypeError):  # TypeError: Windows
        return None
