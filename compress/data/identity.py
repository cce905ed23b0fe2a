"""Which text a source is, told by its files alone: read once in pieces, neither parsed nor cut into splits."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from pydoc_data.topics import topics

from compress.data.files import files_of
from compress.data.sources import SOURCES, local_files
from compress.data.text import Split


def text_digest(source: str, splits: Sequence[Split]) -> str | None:
    """SHA-256 of what decides the text of some splits: names and bytes of the files, or the topics of ``pydoc``.

    Args:
        source: As ``--data`` takes it.
        splits: Those that are read.

    Returns:
        None where no file here decides it: text of the hub, text that a model writes, and a path that is not there.

    Raises:
        CompressError: A folder lacks its train or test file, or has two of one split.
    """
    if source == "pydoc":
        return hashlib.sha256(json.dumps(topics, sort_keys=True).encode()).hexdigest()
    if source == "self":
        return None
    if source in SOURCES:
        here = local_files(source)
        files = [file for split in splits for file in here.get(split, [])]
    else:
        path = Path(source).expanduser()
        files = [file for split in splits for file in files_of(path, split)] if path.exists() else []
    if not files:
        return None
    total = hashlib.sha256()
    for file in dict.fromkeys(files):
        with file.open("rb") as stream:
            content = hashlib.file_digest(stream, "sha256").hexdigest()
        total.update(json.dumps([file.name, content]).encode() + b"\n")
    return total.hexdigest()
