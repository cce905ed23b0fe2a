"""Large new tensors in large pages of memory, which the system hands out sooner."""

from __future__ import annotations

import ctypes
import mmap
import sys

import torch
from torch import Tensor

_LARGE = 4 << 20
"""Bytes from which a tensor has pages of its own, so that advice concerns nobody else."""


def empty(*shape: int, dtype: torch.dtype) -> Tensor:
    """As ``torch.empty`` on the CPU. On Linux, one of 4 MB and more asks for pages of 2 MB instead of 4 KB.

    The first write to every page costs a call of the system, which for a dequantized matrix takes longer than
    computing it. The advice may be ignored, and nothing depends on it.
    """
    made = torch.empty(*shape, dtype=dtype)
    if sys.platform == "linux" and made.nbytes >= _LARGE:
        page = mmap.PAGESIZE
        first = -(-made.data_ptr() // page) * page
        last = (made.data_ptr() + made.nbytes) // page * page
        advise = ctypes.CDLL(None).madvise
        advise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), ctypes.c_int(mmap.MADV_HUGEPAGE))
    return made
