"""Half-quadratic quantization as hqq does it: zeros fitted to the weights alone, without calibration."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from compress.benchmarks.peers.environment import ENVIRONMENTS, TIMEOUT, PeerResult, run_peer

__all__ = ["quantize_with_hqq"]

_RUNNER = Path(__file__).with_name("hqq_runner.py")


def quantize_with_hqq(
    model: Path,
    out: Path,
    *,
    bits: int = 4,
    group_size: int = 64,
    axis: Literal[0, 1] = 1,
    environment: Path = ENVIRONMENTS / "hqq",
    threads: int = 1,
    timeout: float = TIMEOUT,
) -> PeerResult:
    """HQQ with hqq's defaults; scales and zeros are stored in float16.

    Args:
        model: Dense checkpoint.
        out: New folder for the result.
        bits: 1, 2, 3, 4 or 8. Three bits are stored as ten codes in 32 bits.
        group_size: Weights that share a scale and a zero.
        axis: 1, hqq's default: groups of weights in a row, which fast kernels need. 0: groups of every so manieth
            weight of the matrix.
        environment: Made by ``make peers``.
        threads: Of torch.
        timeout: Seconds until it is given up.

    Raises:
        UsageError: See `run_peer`.
        CompressError: See `run_peer`.
    """
    return run_peer(
        _RUNNER,
        model,
        None,
        out,
        settings={"bits": bits, "group_size": group_size, "axis": axis},
        distributions=("hqq",),
        environment=environment,
        threads=threads,
        timeout=timeout,
    )
