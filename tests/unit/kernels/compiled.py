"""The C sources built by tests: as a program under sanitizers, or as a library with flags of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

from tests.sources import ROOT

NATIVE = ROOT / "compress" / "kernels" / "native"
COMPILER = shutil.which("gcc") or shutil.which("cc")
_FLAGS = ("-std=c11", "-D_POSIX_C_SOURCE=200809L", "-O1", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror")
QUICK = ("-DSPECIALIZED=0", "-DCK_EMULATE_BF16")
"""The same loads and stores compiled sooner, and the bfloat16 level on any processor with AVX-512."""
_CHECKS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")


def _objects(folder: Path, sources: Iterable[Path], flags: Iterable[str]) -> list[str]:
    made = {source: str(folder / f"{source.stem}.o") for source in sources}
    builds = [
        subprocess.Popen([str(COMPILER), *_FLAGS, *flags, "-c", str(source), "-o", out])
        for source, out in made.items()
    ]
    assert [build.wait() for build in builds] == [0] * len(builds)
    return list(made.values())


def shared_library(folder: Path, flags: Iterable[str]) -> Path:
    """All sources as a library in ``folder``."""
    objects = _objects(folder, sorted(NATIVE.glob("*.c")), (*flags, "-fvisibility=hidden", "-fPIC"))
    found = folder / "library.so"
    subprocess.run([str(COMPILER), "-shared", *objects, "-pthread", "-o", str(found)], check=True)
    return found


def check_sanitized(folder: Path, driver: Path, sources: Iterable[Path], flags: Iterable[str] = ()) -> None:
    """Build ``driver`` with the sources under both sanitizers, and run it: it must find nothing, and nothing wrong."""
    program = folder / "sanitized"
    objects = _objects(folder, (*sources, driver), (*flags, *_CHECKS))
    subprocess.run([str(COMPILER), *_CHECKS, *objects, "-pthread", "-lm", "-o", str(program)], check=True)
    environment = {key: value for key, value in os.environ.items() if key != "LD_PRELOAD"}
    done = subprocess.run([str(program)], env=environment, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (0, "0 wrong\n", "")
