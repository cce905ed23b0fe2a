"""Seconds of calls on a GPU, eager and from a CUDA graph, and what the GPU can do at most; on a CPU the interpreter's.

A CUDA graph holds one call on every copy of a contestant's weights, so that a replay goes through all of them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from compress.benchmarks.kernels_cpu_cases import Contestant

AWAKE = 0.05

Calls = Sequence[Callable[[], Any]]


def eager_seconds(calls: Calls, device: torch.device) -> float:
    """Seconds of a call when the host launches one after the other; launches count where the GPU waits for them."""
    if device.type != "cuda":
        began = time.perf_counter()
        for call in calls:
            call()
        return (time.perf_counter() - began) / len(calls)
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for call in calls:
        call()
    stop.record()
    stop.synchronize()
    return float(start.elapsed_time(stop)) / 1e3 / len(calls)


def captured(calls: Calls) -> torch.cuda.CUDAGraph:
    """The calls as a graph; their kernels must have been compiled."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def _awake(graphs: Iterable[torch.cuda.CUDAGraph]) -> None:
    """Replay everybody for some :data:`AWAKE` seconds: an idle GPU's clocks take time to rise."""
    held, until = list(graphs), time.perf_counter() + AWAKE
    while held and time.perf_counter() < until:
        for graph in held:
            graph.replay()
        torch.cuda.synchronize()


def measured(
    contestants: Mapping[str, Contestant], device: torch.device, rounds: int
) -> dict[str, dict[str, Any]]:
    """Median seconds of a call of everybody, in turns: eager, and from a graph on a GPU; what failed says why.

    A peer that fails on this machine is left out with its error, and does not stop the others.
    """
    failed: dict[str, str] = {}
    graphs: dict[str, torch.cuda.CUDAGraph] = {}
    with torch.no_grad():
        for name, contestant in contestants.items():
            try:
                for call in contestant.calls[:2]:
                    call()
                if device.type == "cuda":
                    for call in contestant.calls:
                        call()
                    torch.cuda.synchronize()
                    graphs[name] = captured(contestant.calls)
            except Exception as error:
                if name.startswith(("nf", "dense", "one")):
                    raise
                failed[name] = f"{type(error).__name__}: {error}"
        here = [name for name in contestants if name not in failed]
        _awake(graphs.values())
        eager: dict[str, list[float]] = {name: [] for name in here}
        replayed: dict[str, list[float]] = {name: [] for name in graphs}
        for _ in range(rounds):
            for name in here:
                calls = contestants[name].calls
                eager[name].append(eager_seconds(calls, device))
                if name in graphs:
                    count = len(calls)
                    replayed[name].append(eager_seconds([graphs[name].replay], device) / count)
    found: dict[str, dict[str, Any]] = {
        name: {
            "weight_bytes": contestants[name].weight_bytes,
            "eager_seconds": statistics.median(eager[name]),
            "graph_seconds": statistics.median(replayed[name]) if name in replayed else None,
        }
        for name in here
    }
    return found | {name: {"failed": why} for name, why in failed.items()}


def ceilings(device: torch.device, *, quick: bool = False) -> dict[str, float]:
    """Bytes per second of a copy (read and written), and bfloat16 operations per second of a large square product."""
    nbytes, size = (1 << 20, 128) if quick else (1 << 30, 8192)
    source = torch.ones(nbytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    left, right = torch.ones(2, size, size, dtype=torch.bfloat16, device=device)
    found = {}
    for name, call, amount in (
        ("bytes_per_second", lambda: target.copy_(source), 2 * nbytes),
        ("operations_per_second", lambda: torch.mm(left, right), 2 * size**3),
    ):
        call()
        found[name] = amount / min(eager_seconds([call] * 3, device) for _ in range(5))
    return found


def extra_bytes(call: Callable[[], Any], device: torch.device) -> int | None:
    """Most bytes that a call holds beyond what was held before and what it returns; None on a CPU."""
    if device.type != "cuda":
        return None
    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    kept = call()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated(device) - before
    returned = torch.cuda.memory_allocated(device) - before
    del kept
    return peak - returned
