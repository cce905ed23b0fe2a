"""The project's own source files, for tests that read code instead of running it."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {
    "compress": ROOT / "compress",
    "compress.pipelines": ROOT / "pipelines",
    "compress.solvers": ROOT / "solvers",
    "compress.benchmarks": ROOT / "benchmarks",
}
"""Installed package -> folder on disk, as pyproject.toml maps them."""


@cache
def modules() -> dict[str, Path]:
    """Installed module name -> source file, of everything the wheel ships."""
    found = {}
    for package, folder in FOLDERS.items():
        for file in sorted(folder.rglob("*.py")):
            parts = file.relative_to(folder).with_suffix("").parts
            found[".".join((package, *parts)).removesuffix(".__init__")] = file
    return found


@cache
def tree(file: Path) -> ast.Module:
    """The parsed source of ``file``."""
    return ast.parse(file.read_text(encoding="utf-8"), filename=str(file))


def place(file: Path, node: ast.AST) -> str:
    """``folder/file.py:line``, for an assertion message."""
    return f"{file.relative_to(ROOT)}:{getattr(node, 'lineno', 1)}"
