"""The table of GPU kernels that a device measures: sizes of fused tiles, and from how many tokens slices are faster."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from compress.benchmarks.kernels_gpu_cases import (
    DTYPE,
    Setting,
    Shape,
    copied,
    random_quantized,
    tiled,
    turns,
)
from compress.benchmarks.kernels_gpu_clock import measured
from compress.benchmarks.roofline import TOKEN_TILES, WIDTHS
from compress.kernels.cuda.product import serves
from compress.kernels.triton import product
from compress.kernels.triton.choice import FORMAT_VERSION, Choice, Fused, Slices, Tiles, with_splits

CANDIDATES: tuple[tuple[dict[str, int], int], ...] = tuple(
    ({"rows": rows, "chunks": chunks, "warps": warps, "stages": 1}, programs)
    for rows, chunks, warps in ((32, 2, 2), (64, 2, 4), (128, 2, 4), (64, 4, 4), (128, 2, 8))
    for programs in (2, 4)
)
"""Sizes of a program, and programs per multiprocessor to aim at."""
CHANGEOVERS = (32, 64, 128, 256, 512)
"""Tokens at which tiles and slices are compared."""


def seconds_of(
    setting: Setting, shape: Shape, bits: int, tokens: int, choice: Choice, transposed: bool
) -> float:
    """Seconds of a call, from a graph where there is one; infinity where it wants more than the device has."""
    matrix = tiled(random_quantized(shape, bits, setting.device))
    x = torch.randn(tokens, shape[0] if transposed else shape[1], device=setting.device).to(DTYPE)
    call = product.product_transposed if transposed else product.product
    contestant = turns(setting, matrix.nbytes, lambda: partial(call, x, copied(matrix), None, choice=choice))
    found = measured({"candidate": contestant}, setting.device, 3)["candidate"]
    if "failed" in found:
        return float("inf")
    return float(found["graph_seconds"] or found["eager_seconds"])


def measured_table(
    setting: Setting,
    shape: Shape,
    processors: int,
    *,
    name: str,
    deadline: float,
    candidates: Sequence[tuple[dict[str, int], int]] = CANDIDATES,
    widths: Sequence[int] = WIDTHS,
) -> dict[str, Any]:
    """A table as :mod:`compress.kernels.triton.choice` reads it.

    For each width the CUDA C++ kernels up to where slices are faster; for each width, direction and tile of tokens the
    fastest candidate, which stands in where those do not serve; slices from where they are faster than it.

    Args:
        setting: Where.
        shape: (O, I) of the matrix it is measured on.
        processors: Multiprocessors of the device.
        name: Of the device, for the table's own account.
        deadline: ``time.monotonic()`` after which no further candidate is tried; those tried until then decide.
        candidates: Sizes of a program, and programs per multiprocessor.
        widths: Of codes.
    """
    rules: list[dict[str, Any]] = []
    for transposed in (False, True):
        for bits in widths:
            own = {"bits": [bits], "transposed": transposed}
            if not transposed and (until := _fused_until(setting, shape, bits, deadline)):
                rules.append({**own, "most_tokens": until, "fused": {}})
            for tile in TOKEN_TILES:
                best = _fastest(setting, shape, bits, tile, transposed, processors, candidates, deadline)
                most = tile
                if tile == TOKEN_TILES[-1]:
                    most = _changeover(setting, shape, bits, transposed, processors, best, deadline)
                rules.append(
                    {**own, "most_tokens": most, "tiles": {**best[0], "tokens": tile}, "programs": best[1]}
                )
        rules.append(
            {
                "bits": list(WIDTHS),
                "transposed": transposed,
                "most_tokens": None,
                "slices": {"nbytes": Slices().nbytes},
            }
        )
    origin = f"measured on {name} with {shape[0]} x {shape[1]}"
    return {"format_version": FORMAT_VERSION, "origin": origin, "measured": True, "rules": rules}


def _fused_until(setting: Setting, shape: Shape, bits: int, deadline: float) -> int:
    """Most tokens, of those compared, at which the CUDA C++ kernels are not slower than slices; 0: none."""
    geometry = tiled(random_quantized(shape, bits, setting.device)).geometry
    last = 0
    for tokens in (*TOKEN_TILES, *CHANGEOVERS) if serves(setting.device, geometry, DTYPE) else ():
        if tokens <= last or time.monotonic() > deadline:
            continue
        fused = seconds_of(setting, shape, bits, tokens, Fused(), False)
        if fused > seconds_of(setting, shape, bits, tokens, Slices(), False):
            break
        last = tokens
    return last


def _choice(
    sizes: dict[str, int], programs: int, shape: Shape, tokens: int, tile: int, transposed: bool
) -> Tiles:
    return with_splits(Tiles(**sizes, tokens=tile), programs, shape, tokens, transposed=transposed)


def _fastest(
    setting: Setting,
    shape: Shape,
    bits: int,
    tile: int,
    transposed: bool,
    processors: int,
    candidates: Sequence[tuple[dict[str, int], int]],
    deadline: float,
) -> tuple[dict[str, int], int]:
    best, least = candidates[0], float("inf")
    for sizes, programs in candidates:
        if time.monotonic() > deadline:
            break
        choice = _choice(sizes, programs * processors, shape, tile, tile, transposed)
        seconds = seconds_of(setting, shape, bits, tile, choice, transposed)
        if seconds < least:
            best, least = (sizes, programs), seconds
    return best


def _changeover(
    setting: Setting,
    shape: Shape,
    bits: int,
    transposed: bool,
    processors: int,
    best: tuple[dict[str, int], int],
    deadline: float,
) -> int:
    """Most tokens at which tiles are not slower than slices, of those compared."""
    last = TOKEN_TILES[-1]
    for tokens in CHANGEOVERS:
        if tokens <= last or time.monotonic() > deadline:
            continue
        choice = _choice(best[0], best[1] * processors, shape, tokens, TOKEN_TILES[-1], transposed)
        tiles = seconds_of(setting, shape, bits, tokens, choice, transposed)
        if tiles > seconds_of(setting, shape, bits, tokens, Slices(), transposed):
            break
        last = tokens
    return last
