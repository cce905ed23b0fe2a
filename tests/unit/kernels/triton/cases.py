"""Random matrices where the Triton kernels run: on the GPU if there is one, else on the CPU by the interpreter."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from compress.kernels.library import library
from compress.kernels.packed import TiledMatrix
from compress.kernels.triton.launch import runs_on

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")

needs_kernels = pytest.mark.skipif(
    library() is None or not runs_on(DEVICE),
    reason="triton is not installed, or the C library that makes the cases was not built",
)

ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
"""Largest relative error of a result: a rounding to its type, and in float32 that of the sums."""


def placed(matrix: TiledMatrix) -> TiledMatrix:
    """The same matrix on the device."""
    names = ("codes", "scale_codes", "steps", "offset", "table")
    return replace(matrix, **{name: getattr(matrix, name).to(DEVICE) for name in names})


def assert_near(
    found: torch.Tensor, exact: torch.Tensor, magnitudes: torch.Tensor, *, rounded: torch.Tensor | None = None
) -> None:
    """Equal but for one rounding to the type of ``found``, float32 sums of terms of these magnitudes, and rounding of
    something else to that type.
    """
    error = (found.cpu().double() - exact).abs()
    bound = ROUNDING[found.dtype] * exact.abs() + ROUNDING[torch.float32] * magnitudes + 1e-12
    if rounded is not None:
        bound += ROUNDING[found.dtype] * rounded.abs()
    if found.dtype == torch.float16:
        bound += 2**-25  # its subnormal numbers
    assert bool((error <= bound).all()), float((error - bound).max())
