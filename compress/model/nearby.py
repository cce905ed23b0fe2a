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
    present one, and one level below: the stages of a workspace are among them. Of paths the last parts are compared:
    long paths into one folder are all alike.

    Returns:
        What to give instead, or None where nothing is much like it.
    """
    named = nearest(given, names)
    if named is not None:
        return named
    wanted, paths = Path(given).expanduser(), dict[str, Path]()
    for path in models_near(wanted):
        paths.setdefault(path.name, path)
    near = nearest(wanted.name, paths)
    return None if near is None else str(paths[near])


def models_near(path: Path) -> Iterator[Path]:
    """Model folders and GGUF files around ``path`` and around the present folder, at most two levels deep."""
    for folder in dict.fromkeys((path.parent, Path())):
        for entry in _entries(folder):
            if is_model(entry):
                yield entry
            elif os.path.isdir(entry):
                yield from filter(is_model, _entries(entry))


def is_model(path: Path) -> bool:
    """Whether a path looks like a model: a folder with a config.json, or a GGUF file."""
    # os.path has no folder that may not be entered raise.
    return os.path.isfile(path / "config.json") or (path.suffix == ".gguf" and os.path.isfile(path))


def _entries(folder: Path) -> list[Path]:
    try:
        with os.scandir(folder) as found:
            return sorted(folder / entry.name for entry in itertools.islice(found, ENTRIES))
    except OSError:  # not there, no folder, or not for us to read: nothing is known of it
        return []
