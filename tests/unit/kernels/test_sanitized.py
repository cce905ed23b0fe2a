"""The C sources under AddressSanitizer and UndefinedBehaviorSanitizer, by programs of their own."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.kernels.compiled import COMPILER, NATIVE, QUICK, check_sanitized

pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs a C compiler")
HERE = Path(__file__).parent


def test_the_kernels_touch_only_what_is_theirs(tmp_path: Path) -> None:
    check_sanitized(tmp_path, HERE / "sanitized.c", sorted(NATIVE.glob("*.c")), QUICK)


def test_quantization_touches_only_what_is_its_own(tmp_path: Path) -> None:
    sources = (*sorted(NATIVE.glob("quantize*.c")), NATIVE / "level.c", NATIVE / "pool.c")
    check_sanitized(tmp_path, HERE / "sanitized_quantize.c", sources)
