"""What a stage records of its own files when it is complete: sizes and hashes, for ``compress verify``."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
