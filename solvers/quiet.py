"""Keeps what compiled code writes to standard output away from ours."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def native_output_discarded() -> Iterator[None]:
    """Send file descriptor 1 to the null device for the duration.

    Some HiGHS releases print a debugging line whatever their options say, which would spoil machine-readable
    output. C buffers are emptied before and after, or the line would appear later. Affects the whole process.
    """
    if sys.__stdout__ is None:  # started without a standard output: nothing to protect
        yield
        return
    flush = ctypes.CDLL("ucrtbase" if os.name == "nt" else None).fflush
    sys.__stdout__.flush()
    flush(None)
    saved = os.dup(1)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 1)
    try:
        yield
    finally:
        flush(None)
        os.dup2(saved, 1)
        os.close(saved)
