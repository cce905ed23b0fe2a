"""The kernels are built down to machine code for GPUs that are not there; what the interpreter forgives shows here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from tests.sources import ROOT

from .cases import needs_kernels

pytestmark = needs_kernels

MOST_REGISTERS = 255
"""Of a thread, on every GPU since 2012; a kernel that wants more spills."""


def built(case: str, arch: int) -> list[dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "tests.unit.kernels.triton.compiler", case, str(arch)],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_a_product_is_built_on_tensor_cores_without_spilling() -> None:
    product, total = built("few_tokens", 90)
    assert (product["kernel"], total["kernel"]) == ("product_kernel", "reduce_kernel")
    assert product["mma"]
    for kernel in (product, total):
        assert kernel["local_bytes"] == 0
        assert kernel["registers"] <= MOST_REGISTERS


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("case", ["products", "groups", "layouts", "rounding", "single_rows"])
def test_every_kernel_is_built_without_spilling(case: str, arch: int) -> None:
    found = built(case, arch)
    assert found
    assert [kernel for kernel in found if kernel["local_bytes"]] == []
