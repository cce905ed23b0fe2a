"""4-bit NormalFloat as bitsandbytes does it: rounding alone, without calibration."""

from __future__ import annotations

from pathlib import Path

from compress.benchmarks.peers.environment import ENVIRONMENTS, TIMEOUT, PeerResult, run_peer

__all__ = ["quantize_with_bitsandbytes"]

_RUNNER = Path(__file__).with_name("bitsandbytes_runner.py")


def quantize_with_bitsandbytes(
    model: Path,
    out: Path,
    *,
    double_quantization: bool = True,
    group_size: int = 64,
    environment: Path = ENVIRONMENTS / "bitsandbytes",
    threads: int = 1,
    timeout: float = TIMEOUT,
) -> PeerResult:
    """NF4 as in QLoRA.

    Args:
        model: Dense checkpoint.
        out: New folder for the result.
        double_quantization: Whether scales are stored in 8 bits, in groups of 256, instead of in 32.
        group_size: Consecutive weights that share a scale; 64 is bitsandbytes' default.
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
        settings={"bits": 4, "group_size": group_size, "double_quantization": double_quantization},
        distributions=("bitsandbytes",),
        environment=environment,
        threads=threads,
        timeout=timeout,
    )
