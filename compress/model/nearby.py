"""Which model a name that leads nowhere probably meant: the embedded one, or a model on disk nearby."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from pathlib import Path

from compress.errors import nearest

ENTRIES = 200
"""Most entries of a folder that are looked at."""


def meant(given: str, names: tuple[str, ...] = ()) -> str | None:
    """The name or path of a model that ``given`` is most like.

    Candidates are ``names``, and every Hugging Face folder and GGUF file in the folder that ``given`` leads to, in the
    present one, and one level below: the stages of a workspace are among them. The last part of a path is enough.

    Returns:
        What to give instead, or None where nothing is much like it.
    """
    candidates = {name: name for name in names}
    for path in models_near(Path(given).expanduser()):
        candidates.setdefault(str(path), str(path))
        candidates.setdefault(path.name, str(path))
    candidates.pop(given, None)
    near = nearest(given, candidates) or nearest(Path(given).name, candidates)
    return None if near is None else candidates[near]


def models_near(path: Path) -> Iterator[Path]:
    """Model folders and GGUF files around ``path`` and around the present folder, at most two levels deep."""
    for folder in dict.fromkeys((path.parent, Path())):
        for entry in _entries(folder):
            if is_model(entry):
                yield entry
            elif entry.is_dir():
                yield from filter(is_model, _entries(entry))


def is_model(path: Path) -> bool:
    """Whether a path looks like a model: a folder with a config.json, or a GGUF file."""
    return (path / "config.json").is_file() if path.is_dir() else path.suffix == ".gguf" and path.is_file()


def _entries(folder: Path) -> list[Path]:
    try:
        with os.scandir(folder) as found:
            return sorted(folder / entry.name for entry in itertools.islice(found, ENTRIES))
    except OSError:  # not there, no folder, or not for us to read: nothing is known of it
        return []
