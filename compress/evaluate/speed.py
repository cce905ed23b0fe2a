"""How fast this machine is: three products and two transfers, timed briefly."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from compress.machine import existing

_SIDE = 1024
"""Rows and columns of the products that are timed."""
_FILE = 32 << 20
"""Bytes written and read at a time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """Rates that were measured.

    Attributes:
        products: Floating-point operations a second of products in the compute dtype.
        singles: Of products in float32, on the host.
        doubles: Of products in float64, where the model computes.
        write: Bytes a second written to disk and flushed.
        read: Bytes a second read back; from the system's cache where it holds them.
        seconds: What the measurement took.
    """

    products: float
    singles: float
    doubles: float
    write: float
    read: float
    seconds: float


def measure_speed(place: Path, device: str, dtype: torch.dtype, *, budget: float = 1.0) -> Speed:
    """Time three products and two transfers, about ``budget`` seconds together.

    Each is repeated until its share is over, at least twice; the fastest run counts, since other work on the machine
    only makes one slower.

    Args:
        place: A folder, or where one would be; the file is written to its nearest existing parent and removed.
        device: Where models compute.
        dtype: In which precision.
        budget: Seconds.
    """
    begun = time.perf_counter()
    operations = 2.0 * _SIDE**3
    share = budget / 5
    rates = [
        operations / _fastest(_product(where, kind), share)
        for where, kind in ((device, dtype), ("cpu", torch.float32), (device, torch.float64))
    ]
    with tempfile.TemporaryDirectory(dir=existing(place), prefix=".compress-plan-") as folder:
        file, content = Path(folder) / "speed", os.urandom(1 << 20)
        write = _FILE / _fastest(lambda: _write(file, content), share)
        read = _FILE / _fastest(lambda: _read(file), share)
    return Speed(
        products=rates[0],
        singles=rates[1],
        doubles=rates[2],
        write=write,
        read=read,
        seconds=time.perf_counter() - begun,
    )


def _product(device: str, dtype: torch.dtype) -> Callable[[], None]:
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.rand(_SIDE, _SIDE, generator=generator).to(device, dtype) for _ in range(2))

    def run() -> None:
        torch.mm(left, right)
        if device != "cpu":
            torch.cuda.synchronize(torch.device(device))

    return run


def _fastest(run: Callable[[], None], seconds: float) -> float:
    """Seconds of the fastest of the runs that fit into ``seconds``; at least two."""
    best, begun, runs = float("inf"), time.perf_counter(), 0
    while runs < 2 or time.perf_counter() - begun < seconds:
        start = time.perf_counter()
        run()
        best, runs = min(best, time.perf_counter() - start), runs + 1
    return max(best, 1e-9)


def _write(file: Path, piece: bytes) -> None:
    with file.open("wb") as stream:
        for _ in range(_FILE // len(piece)):
            stream.write(piece)
        stream.flush()
        os.fsync(stream.fileno())


def _read(file: Path) -> None:
    with file.open("rb", buffering=0) as stream:
        while stream.read(1 << 20):
            continue
