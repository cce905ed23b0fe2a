"""Rounding learned by signed gradient descent as AutoRound does it, on the calibration windows that everybody gets."""

from __future__ import annotations

from pathlib import Path

import torch

from compress.benchmarks.peers.environment import ENVIRONMENTS, TIMEOUT, PeerResult, run_peer

__all__ = ["quantize_with_autoround"]

_RUNNER = Path(__file__).with_name("autoround_runner.py")


def quantize_with_autoround(
    model: Path,
    windows: torch.Tensor,
    out: Path,
    *,
    bits: int = 4,
    group_size: int = 64,
    iterations: int = 200,
    environment: Path = ENVIRONMENTS / "autoround",
    threads: int = 1,
    timeout: float = TIMEOUT,
) -> PeerResult:
    """AutoRound with its defaults: symmetric, eight windows a step.

    Args:
        model: Dense checkpoint.
        windows: Calibration, int64 token ids [windows, length].
        out: New folder for the result.
        bits: 2, 3, 4 or 8.
        group_size: Weights of a row that share a scale.
        iterations: Steps for every decoder layer; 200 is AutoRound's default, fewer are its lighter recipes.
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
        windows,
        out,
        settings={"bits": bits, "group_size": group_size, "iterations": iterations},
        distributions=("auto-round",),
        environment=environment,
        threads=threads,
        timeout=timeout,
    )
