"""The C sources under AddressSanitizer and UndefinedBehaviorSanitizer, by a program of their own."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.sources import ROOT

NATIVE = ROOT / "compress" / "kernels" / "native"
DRIVER = Path(__file__).with_name("sanitized.c")
COMPILER = shutil.which("gcc") or shutil.which("cc")


@pytest.mark.skipif(COMPILER is None, reason="needs a C compiler")
def test_the_kernels_touch_only_what_is_theirs(tmp_path: Path) -> None:
    program = tmp_path / "sanitized"
    flags = (
        "-std=c11",
        "-D_POSIX_C_SOURCE=200809L",
        "-O1",
        "-ffp-contract=off",
        "-Wall",
        "-Wextra",
        "-Werror",
    )
    # Not specialized by widths: the same loads and stores, compiled in a fraction of the time.
    flags += ("-DSPECIALIZED=0", "-DCK_EMULATE_BF16")
    checks = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    builds = [
        subprocess.Popen(
            [str(COMPILER), *flags, *checks, "-c", str(source), "-o", str(tmp_path / f"{source.stem}.o")]
        )
        for source in (*sorted(NATIVE.glob("*.c")), DRIVER)
    ]
    assert [build.wait() for build in builds] == [0] * len(builds)
    objects = sorted(map(str, tmp_path.glob("*.o")))
    subprocess.run([str(COMPILER), *checks, *objects, "-pthread", "-lm", "-o", str(program)], check=True)
    environment = {key: value for key, value in os.environ.items() if key != "LD_PRELOAD"}
    done = subprocess.run([str(program)], env=environment, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (0, "0 wrong\n", "")
