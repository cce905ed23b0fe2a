"""Links in a model's folder: followed where they stay in it, or in the hub's cache of the same model, nowhere else."""

from __future__ import annotations

from pathlib import Path

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
