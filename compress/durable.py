"""Files that are there whole or not at all, whatever kills the process or the machine."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def settle(path: Path) -> None:
    """Have the disk hold a file's bytes, or a folder's entries, before anything else is done."""
    windows = os.name == "nt"
    if windows and path.is_dir():  # it cannot be opened, and its entries are journaled without being asked to
        return
    handle = os.open(path, os.O_RDWR if windows else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Where to write what becomes ``path`` when the block ends: on disk first, then under its name, by one rename.

    A reader, and a run after a crash, finds the old file or the new one. A block that fails leaves the old one.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        yield temporary
        settle(temporary)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    settle(path.parent)
