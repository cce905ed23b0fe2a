"""The file of ``eval --out``: what may be there already, and unfinished work beside it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from compress.errors import CompressError, UsageError
from compress.pipelines.workspace import FORMAT_VERSION, read_json, write_json

MARKER = "partial.json"


def check_out(out: Path) -> None:
    """Refuse a file that cannot be written, or that is something else than an evaluation.

    Raises:
        UsageError: It is such a file.
    """
    if out.is_dir() or not out.absolute().parent.is_dir():
        raise UsageError(
            f"The results cannot be written to {out}.", "Give --out a file in a folder that exists."
        )
    if out.is_file():
        _read(out)


def finished_record(out: Path, wanted: str) -> dict[str, Any] | None:
    """The evaluation in ``out`` when it has the id ``wanted``; None when there is no file.

    Raises:
        UsageError: The file holds another evaluation.
    """
    if not out.is_file():
        return None
    record = _read(out)
    if record.get("id") == wanted:
        return record
    raise UsageError(
        f"{out} holds an evaluation with other settings or models.",
        "Give --redo to replace it, or another --out.",
    )


def open_partial(out: Path, wanted: str, *, redo: bool) -> Path:
    """The folder beside ``out`` with the models that are finished; empty unless it is of the very same request.

    Raises:
        UsageError: Unfinished work of another request lies there and ``redo`` is not given, or something else does.
    """
    partial = out.with_name(out.name + ".partial")
    marker = partial / MARKER
    if partial.exists() and not marker.is_file():
        raise UsageError(f"{partial} is in the way.", "Move it, or give another --out.")
    if marker.is_file() and (redo or read_json(marker).get("id") != wanted):
        if not redo:
            raise UsageError(
                f"An unfinished evaluation with other settings or models lies in {partial}.",
                "Repeat that command to finish it, give --redo to drop it, or another --out.",
            )
        shutil.rmtree(partial)
    partial.mkdir(exist_ok=True)
    write_json(marker, {"format_version": FORMAT_VERSION, "id": wanted})
    return partial


def abandon(partial: Path) -> None:
    """Remove the folder when no model in it is finished."""
    if {path.name for path in partial.iterdir()} <= {MARKER}:
        shutil.rmtree(partial)


def _read(out: Path) -> dict[str, Any]:
    try:
        record = read_json(out)
    except CompressError:
        record = {}
    if record.get("verb") != "eval" or not isinstance(record.get("metrics"), dict):
        raise UsageError(f"{out} is no evaluation that this version knows.", "Give --out another file.")
    return record
