"""The C sources of quantization under AddressSanitizer and UndefinedBehaviorSanitizer, by a program of their own."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.sources import ROOT

NATIVE = ROOT / "compress" / "kernels" / "native"
DRIVER = Path(__file__).with_name("sanitized_quantize.c")
COMPILER = shutil.which("gcc") or shutil.which("cc")


@pytest.mark.skipif(COMPILER is None, reason="needs a C compiler")
def test_quantization_touches_only_what_is_its_own(tmp_path: Path) -> None:
    program = tmp_path / "sanitized"
    sources = (*sorted(NATIVE.glob("quantize*.c")), NATIVE / "level.c", NATIVE / "pool.c", DRIVER)
    flags = (
        "-std=c11",
        "-D_POSIX_C_SOURCE=200809L",
        "-O1",
        "-ffp-contract=off",
        "-Wall",
        "-Wextra",
        "-Werror",
    )
    checks = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    command = [str(COMPILER), *flags, *checks, *map(str, sources), "-pthread", "-lm", "-o", str(program)]
    subprocess.run(command, check=True)
    environment = {key: value for key, value in os.environ.items() if key != "LD_PRELOAD"}
    done = subprocess.run([str(program)], env=environment, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (0, "0 wrong\n", "")
