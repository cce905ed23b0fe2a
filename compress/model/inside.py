"""Links in a model's folder: followed where they stay in it, or in the hub's cache of the same model, nowhere else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from compress.errors import CompressError


def require_inside(folder: Path, file: Path) -> None:
    """Refuse a file whose content lies elsewhere: it may be a secret that the result would carry along.

    Args:
        folder: A model's; where it is ``snapshots/REVISION`` of the hub's cache, its files are links to ``blobs``.
        file: In it, perhaps a link.

    Raises:
        CompressError: It leads out.
    """
    home, real = folder.resolve(), file.resolve()
    homes = [home, *([home.parent.parent] if home.parent.name == "snapshots" else [])]
    if not any(real.is_relative_to(place) for place in homes):
        raise CompressError(
            f"{file} is a link that leads out of its folder.",
            "Put the file itself there if you trust it, or do not use this checkpoint.",
        )


def read_json_inside(file: Path, remedy: str) -> dict[str, Any]:
    """The JSON object in a file of somebody else's folder.

    Args:
        file: In its folder, no link out of it.
        remedy: What to do where it cannot be read.

    Raises:
        CompressError: It leads out of its folder, or is no JSON object.
    """
    require_inside(file.parent, file)
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CompressError(f"{file} is not JSON ({type(error).__name__}: {error}).", remedy) from error
    if not isinstance(found, dict):
        raise CompressError(f"{file} is no JSON object.", remedy)
    return found
