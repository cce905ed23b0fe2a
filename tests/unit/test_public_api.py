"""`import compress`: light, lazy, and complete."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import compress


@pytest.mark.parametrize("name", compress.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(compress, name).__name__ == name
    assert name in dir(compress)


def test_the_version_is_that_of_the_distribution() -> None:
    assert compress.__version__ == importlib.metadata.version("compress-llm")


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="wat"):
        compress.wat  # noqa: B018


def test_importing_is_light_and_waits_for_transformers(tmp_path: Path) -> None:
    program = (
        "import sys, time; start = time.perf_counter(); import compress; spent = time.perf_counter() - start\n"
        "heavy = {'torch', 'transformers', 'numpy', 'safetensors', 'typer'} & set(sys.modules)\n"
        "import compress as again\n"
        "print(sorted(heavy), sum(type(f).__name__ == '_TableFinder' for f in sys.meta_path), spent)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    heavy, finders, spent = done.stdout.rsplit(maxsplit=2)
    assert (heavy, finders) == ("[]", "1")
    assert float(spent) < 0.5  # takes a few milliseconds; a heavy import takes seconds
