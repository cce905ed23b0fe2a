"""What MkDocs does beside its own work: lay out the packages for the reference, and take along linked files.

Pages link to files of the repository that are no pages (``../benchmarks/results/solver-cpu.json``). On the site such a
file lies under ``files/``, and the link leads there.
"""

from __future__ import annotations

import posixpath
import re
import shutil
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {"": "compress", "pipelines": "pipelines", "solvers": "solvers", "benchmarks": "benchmarks"}
"""Name inside the installed package -> folder, as ``package-dir`` of pyproject.toml maps them."""
FILES = "files"
_NO_PYTHON = shutil.ignore_patterns("__pycache__", "*.so", "*.c", "*.h", "results")
_ROLE = re.compile(r":(class|func|meth|mod|data):`(?:~[\w.]+\.)?([\w.]+)`")
_LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)#\s]+)")


def on_startup(*, command: str, dirty: bool) -> None:
    """Lay the sources out before the plugins look for them."""
    lay_out()


def on_config(config: Any) -> Any:
    """Lay them out again for every build of `mkdocs serve`."""
    lay_out()
    return config


def lay_out() -> None:
    """Put the sources into ``build/docs`` as they are once installed; the reference is read from there.

    They are copied: links would be followed back to the folders of the repository.
    """
    installed = ROOT / "build" / "docs" / "compress"
    shutil.rmtree(installed, ignore_errors=True)
    for name, folder in PACKAGES.items():
        target = installed / name
        shutil.copytree(
            ROOT / folder, target, dirs_exist_ok=True, ignore=_NO_PYTHON, copy_function=_plain_copy
        )


def _plain_copy(source: str, target: str) -> str:
    """Copy a source file; names that its docstrings give with a Sphinx role become plain code."""
    text = Path(source).read_text(encoding="utf-8")
    Path(target).write_text(_ROLE.sub(lambda role: f"`{role[2]}`", text), encoding="utf-8")
    return target


def on_files(files: Files, *, config: Any) -> Files:
    """Add every file of the repository that a page links to."""
    for page in list(files.documentation_pages()):
        for target in _LINK.findall(page.content_string):
            path = _outside(page.src_uri, target)
            if path is not None and files.get_file_from_path(f"{FILES}/{path}") is None:
                files.append(File.generated(config, f"{FILES}/{path}", abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: Any, files: Files) -> str:
    """Turn links to such files to where they lie on the site."""
    here = page.file.src_uri

    def moved(match: re.Match[str]) -> str:
        path = _outside(here, match.group(1))
        if path is None:
            return match.group(1)
        return posixpath.relpath(f"{FILES}/{path}", posixpath.dirname(here) or ".")

    return _LINK.sub(moved, markdown)


def _outside(page: str, target: str) -> str | None:
    """The path in the repository that a link means; None for one to a page, or to no file."""
    path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), target))
    if path.startswith(("docs/", "../")) or not (ROOT / path).is_file():
        return None
    return path
