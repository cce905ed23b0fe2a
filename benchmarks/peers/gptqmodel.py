"""GPTQ as GPTQModel does it, on the calibration windows that everybody gets."""

from __future__ import annotations

from pathlib import Path

import torch

from compress.benchmarks.peers.environment import ENVIRONMENTS, TIMEOUT, PeerResult, run_peer

__all__ = ["quantize_with_gptqmodel"]

_RUNNER = Path(__file__).with_name("gptqmodel_runner.py")

_WORKERS = 2
"""Its pool for packing and solving; the default, half the processors, is 1 on small machines."""


def quantize_with_gptqmodel(
    model: Path,
    windows: torch.Tensor,
    out: Path,
    *,
    bits: int = 4,
    group_size: int = 64,
    symmetric: bool = True,
    environment: Path = ENVIRONMENTS / "gptqmodel",
    threads: int = 1,
    timeout: float = TIMEOUT,
) -> PeerResult:
    """GPTQ with GPTQModel's defaults: columns ordered inside the groups, damping 0.05.

    Args:
        model: Dense checkpoint.
        windows: Calibration, int64 token ids [windows, length].
        out: New folder for the result.
        bits: 2, 3, 4 or 8.
        group_size: Weights of a row that share a scale.
        symmetric: No zero points of their own, its default.
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
        settings={"bits": bits, "group_size": group_size, "symmetric": symmetric},
        distributions=("gptqmodel",),
        environment=environment,
        threads=threads,
        variables={"GPTQMODEL_CPU_WORKERS": str(_WORKERS)},
        timeout=timeout,
    )
