"""What this machine can do at most: multiplications in registers, and bytes copied through memory."""

from __future__ import annotations

import ctypes
import time
from concurrent.futures import ThreadPoolExecutor

import torch

from compress.kernels.native_product import TYPES, multiplies_narrow
from compress.kernels.packed import needed

_COPIED = 128 << 20
_PER_ROUND = 192


def bandwidth(*, repeats: int = 5) -> float:
    """Bytes per second that a copy of 128 MB reads and writes together on torch's threads, the fastest of some."""
    source = torch.ones(_COPIED, dtype=torch.uint8)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        target.copy_(source)
        seconds.append(time.perf_counter() - began)
    return 2 * _COPIED / min(seconds)


def multiplications(
    dtype: torch.dtype = torch.float32, *, rounds: int = 10_000_000, repeats: int = 5
) -> float:
    """Multiplications (each with an addition) per second at the level in force, on as many threads as torch has.

    Args:
        dtype: What the products of this type of input are made with; ``bfloat16`` is float32 but at ``avx512_bf16``.
        rounds: Of 192 or 384 multiplications.
        repeats: The fastest counts.

    Raises:
        UsageError: The C library is not in use.
    """
    run = needed().ck_peak
    run.restype = ctypes.c_float
    threads = torch.get_num_threads()
    narrow = multiplies_narrow(dtype)
    number = ctypes.c_int64
    seconds = []
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(repeats):
            began = time.perf_counter()
            list(pool.map(run, [number(rounds)] * threads, [number(TYPES[dtype])] * threads))
            seconds.append(time.perf_counter() - began)
    return (2 if narrow else 1) * _PER_ROUND * rounds * threads / min(seconds)
