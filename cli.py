"""Launcher for a checkout: ``python cli.py prune --ratio 0.5``."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path


def installed_from_here() -> bool:
    """Whether this Python has the project of this very checkout installed as editable."""
    spec = importlib.util.find_spec("compress.pipelines")
    if spec is None or spec.origin is None:
        return False
    return Path(spec.origin).resolve().parent == Path(__file__).resolve().parent / "pipelines"


def main() -> int:
    """Hand over to the installed command line, or say why that cannot be.

    Returns:
        The exit code.
    """
    if not installed_from_here():
        print(
            f"This checkout is not installed in {sys.executable}.\n"
            "Run `python -m pip install -c constraints.txt -e .` in its folder, then try again.",
            file=sys.stderr,
        )
        return 1
    from compress.__main__ import main as command_line

    command_line()
    return 0


if __name__ == "__main__":
    sys.exit(main())
