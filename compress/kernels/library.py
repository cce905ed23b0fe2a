"""The C library: found beside this file, loaded on first use, its instruction-set level chosen.

``COMPRESS_KERNELS`` names a level for the whole process: ``torch`` (do without the library), ``scalar``, ``avx2``,
``avx512`` or ``avx512_bf16``. Without it, the best that the processor has is taken. ``triton`` leaves that as it is and
concerns :mod:`compress.kernels.gpu`. A level concerns the CPU alone.
"""

from __future__ import annotations

import ctypes
import os
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from compress.errors import UsageError

LEVELS = ("scalar", "avx2", "avx512", "avx512_bf16")
"""Instruction-set levels by their number in the library, each a superset of the one before."""
VARIABLE = "COMPRESS_KERNELS"
TRITON = "triton"

_ABI = 3
_FILE = Path(__file__).with_name("_native" + (sysconfig.get_config_var("EXT_SUFFIX") or ".so"))


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelStatus:
    """What quantized operations on the CPU run on.

    Attributes:
        level: One of :data:`LEVELS`, or ``torch`` without the library.
        path: The library, None where it is not loaded.
        available: Levels that this processor and library have, ``torch`` first.
        reason: Why this level, in words.
    """

    level: str
    path: Path | None
    available: tuple[str, ...]
    reason: str


def wanted() -> str | None:
    """What the environment asks for, None for nothing.

    Raises:
        UsageError: There is no such thing.
    """
    name = os.environ.get(VARIABLE, "").strip().lower()
    if name and name not in ("torch", *LEVELS, TRITON):
        raise UsageError(
            f"{VARIABLE} is {name!r}.", f"Choose torch, {', '.join(LEVELS)}, {TRITON}, or unset it."
        )
    return name or None


@cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    """The library and its standing, whatever the environment asks for."""
    if not _FILE.is_file():
        return None, "the library was not built (no C compiler when compress was installed)"
    try:
        found = ctypes.CDLL(str(_FILE))
        abi = found.ck_abi()
    except (OSError, AttributeError) as error:
        return None, f"the library cannot be loaded: {error}"
    if abi != _ABI:
        return None, "the library was built from other sources; install compress again"
    address, number = ctypes.c_void_p, ctypes.c_int64
    found.ck_linear_floats.argtypes, found.ck_linear_floats.restype = (
        (address, number, number, number),
        number,
    )
    found.ck_linear.argtypes = (
        *[address] * 3,
        number,
        number,
        address,
        address,
        number,
        *[address] * 2,
        number,
    )
    return found, ""


@cache
def library() -> ctypes.CDLL | None:
    """The library at the level in force; None where torch serves.

    Raises:
        UsageError: The environment asks for a level that there is no name for.
    """
    asked = wanted()
    found, _ = _load()
    if found is None or asked == "torch":
        return None
    found.ck_set_level(LEVELS.index(asked) if asked in LEVELS else -1)
    return found


def status() -> KernelStatus:
    """What quantized operations on the CPU run on, and why.

    Raises:
        UsageError: The environment asks for a level that there is no name for.
    """
    asked = wanted()
    found, problem = _load()
    if found is None:
        return KernelStatus(level="torch", path=None, available=("torch",), reason=problem)
    available = ("torch", *LEVELS[: found.ck_best_level() + 1])
    if library() is None:
        return KernelStatus(level="torch", path=None, available=available, reason=f"{VARIABLE} asks for it")
    level = LEVELS[found.ck_level()]
    if asked in (None, TRITON):
        reason = "the best this processor has"
    elif level == asked:
        reason = f"{VARIABLE} asks for it"
    else:
        reason = f"{VARIABLE} asks for {asked}, which this processor lacks"
    return KernelStatus(level=level, path=_FILE, available=available, reason=reason)


@contextmanager
def using(level: str) -> Iterator[None]:
    """Another level inside the block, for tests and measurements; not meant for several threads at once.

    Raises:
        UsageError: The library or the processor lacks it.
    """
    found = library()
    if found is None or level not in LEVELS or LEVELS.index(level) > found.ck_best_level():
        raise UsageError(
            f"The kernels have no level {level!r} here.", f"Choose one of {', '.join(status().available)}."
        )
    before = found.ck_level()
    found.ck_set_level(LEVELS.index(level))
    try:
        yield
    finally:
        found.ck_set_level(before)
