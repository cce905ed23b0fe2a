"""What a stage records of its own files when it is complete: sizes and hashes, and whether they still hold."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from compress.errors import CompressError
from compress.progress import Progress

RECORDS = ("stage.json", "partial.json")
"""The workspace's own files in a stage folder: they hold the hashes, and so have none."""


def hash_file(path: Path) -> str:
    """Sha256 of a file's bytes, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def files_below(folder: Path) -> dict[str, Path]:
    """Every file below a stage folder by its relative path, but for the workspace's records of the stage."""
    return {
        path.relative_to(folder).as_posix(): path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not (path.parent == folder and path.name in RECORDS)
    }


def describe_files(folder: Path, *, scratch: Sequence[str] = ()) -> dict[str, dict[str, Any]]:
    """``bytes`` and ``sha256`` of every file below a stage folder, by relative path.

    Args:
        folder: Of the stage.
        scratch: Patterns of sub-folders that are no part of the artifact.
    """
    skipped = {path.name for pattern in scratch for path in folder.glob(pattern)}
    return {
        name: {"bytes": path.stat().st_size, "sha256": hash_file(path)}
        for name, path in files_below(folder).items()
        if "/" not in name or name.partition("/")[0] not in skipped
    }


def require_unchanged(
    folder: Path,
    record: Mapping[str, Any],
    *,
    only: Sequence[str] = (),
    progress: Progress | None = None,
) -> None:
    """Refuse a finished stage whose files are not those that it recorded; reads every byte of them once.

    Sizes come first, since they cost nothing. Times of files tell nothing of a damaged disk, and copies change them.

    Args:
        folder: Of the stage.
        record: Its ``stage.json``; one that has no hashes, of an earlier version, is taken as it is.
        only: Names of the files that matter; none: all.
        progress: Called after every file.

    Raises:
        CompressError: With the first file that is gone or has other content.
    """
    known = record.get("files") or {}
    names = sorted(name for name in known if not only or name in only)
    for name in names:
        path = folder / name
        if not path.is_file() or path.stat().st_size != known[name]["bytes"]:
            raise _changed(folder, name)
    for done, name in enumerate(names, start=1):
        if hash_file(folder / name) != known[name]["sha256"]:
            raise _changed(folder, name)
        if progress is not None:
            progress(done, len(names), name)


def _changed(folder: Path, name: str) -> CompressError:
    state = "has changed since" if (folder / name).is_file() else "is gone, and was there when"
    return CompressError(
        f"The file {folder / name} {state} the stage was complete.",
        "Restore it from a copy, or make the stage again with --redo.",
    )
