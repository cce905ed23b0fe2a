"""The threads that the C library works on: those of the OpenMP that torch has loaded, where it is GNU's."""

from __future__ import annotations

import ctypes
import os
from functools import cache
from pathlib import Path

import torch

_NEEDED = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")


def loaded_openmp() -> ctypes.CDLL | None:
    """GNU's OpenMP as torch uses it; None where torch has another one or none, or nothing tells what is loaded."""
    mode = getattr(os, "RTLD_NOLOAD", None)
    if mode is None:
        return None
    bundled = sorted(Path(torch.__file__).parent.joinpath("lib").glob("libgomp*.so*"))
    for name in (*map(str, bundled), "libgomp.so.1"):
        try:
            found = ctypes.CDLL(name, mode=mode | os.RTLD_NOW)
        except OSError:
            continue
        if all(hasattr(found, function) for function in _NEEDED):
            return found
    return None


@cache
def join(library: ctypes.CDLL) -> bool:
    """Let the C library work on torch's threads; says whether it does. Otherwise it makes threads of its own."""
    openmp = loaded_openmp()
    if openmp is None:
        return False
    library.ck_set_team(*(ctypes.cast(getattr(openmp, name), ctypes.c_void_p) for name in _NEEDED))
    return True
