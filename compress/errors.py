"""Errors a user can act on: one sentence of cause, one of remedy, with the name that was probably meant."""

from __future__ import annotations

import difflib
import errno
import os
import reprlib
from collections.abc import Iterable


class CompressError(Exception):
    """A failure with a known cause.

    Args:
        cause: One sentence: what went wrong, with the offending value.
        remedy: One sentence: what to do about it.
    """

    exit_code = 1

    def __init__(self, cause: str, remedy: str) -> None:
        super().__init__(cause, remedy)
        self.cause = cause
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.cause} {self.remedy}"


class UsageError(CompressError):
    """The request itself is wrong (option, ratio, budget, recipe key): exit code 2."""

    exit_code = 2


_KEPT = "then give the same command again: finished work is kept"
_SYSTEM: dict[int, tuple[str, str]] = {
    errno.ENOSPC: ("The disk is full", f"Free some space; {_KEPT}."),
    errno.EDQUOT: ("The disk quota is used up", f"Free some space; {_KEPT}."),
    errno.EFBIG: ("A file would become larger than is allowed here", f"Raise the limit; {_KEPT}."),
    errno.EROFS: ("The file system is read-only", "Choose another folder."),
    errno.EACCES: ("Access is denied", "Choose another folder, or change its permissions."),
    errno.EPERM: ("The system does not permit it", "Choose another folder, or change its permissions."),
    errno.EIO: ("Reading from or writing to the disk failed", f"Check the disk or copy the file; {_KEPT}."),
    errno.EMFILE: ("Too many files are open", f"Raise the limit (ulimit -n); {_KEPT}."),
    errno.ENOTDIR: ("A part of the path is no folder", "Choose another folder."),
    errno.ENAMETOOLONG: ("A name is too long", "Choose a shorter one."),
}


def system_failure(error: OSError) -> CompressError | None:
    """What the operating system refused, as an error with a remedy; None for what no user can act on.

    Args:
        error: As it was raised; its file names become a part of the cause.
    """
    if error.errno not in _SYSTEM:
        return None
    cause, remedy = _SYSTEM[error.errno]
    name = error.filename if error.filename is not None else error.filename2
    place = (
        "" if name is None else f": {os.fsdecode(name)!r}" if isinstance(name, bytes | str) else f": {name!r}"
    )
    return CompressError(f"{cause}{place}.", remedy)


_NO_MEMORY = (
    "DefaultCPUAllocator: ",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)
"""In what torch says when there is no memory, where it has no class of its own for that."""


def out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, of the host or of a device, rather than anything being wrong."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    named = any(kind.__name__ == "OutOfMemoryError" for kind in type(error).__mro__)
    return (
        named
        or isinstance(error, MemoryError)
        or (isinstance(error, RuntimeError) and any(sign in str(error) for sign in _NO_MEMORY))
    )


def shown(value: object) -> str:
    """``repr`` of a value that a stranger may have written, cut where it is long or deeply nested."""
    cutting = reprlib.Repr()
    cutting.maxstring = cutting.maxother = cutting.maxlong = 80
    return cutting.repr(value)


def nearest(given: str, names: Iterable[str]) -> str | None:
    """The name that ``given`` is most like, whatever its case; None where no name is much like it."""
    spelled = {name.lower(): name for name in names}
    near = difflib.get_close_matches(given.lower(), spelled, n=1)
    return spelled[near[0]] if near else None


def choose(given: object, names: Iterable[str]) -> str:
    """The remedy for something that is not among ``names``: the nearest of them, and which there are."""
    known = list(names)
    near = nearest(given, known) if isinstance(given, str) else None
    if near is None:
        return f"Choose one of: {', '.join(known)}."
    return f"Did you mean {near!r} (one of: {', '.join(known)})?"
