"""What the benchmark of the GPU checks and times of merging and recovery: from memory of the host and back to it.

Nothing is read from disk or written: seconds are those of copies, products and decompositions. Floors are the bytes
that have to cross over the bandwidth of pinned copies one way, measured here; both ways run at the same time.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compress.adapters.batched import LIMIT, Job, Spec, run_batched
from compress.adapters.factors import add_rounded, factor_product, recompress
from compress.adapters.lanes import HostLanes, Lanes, device_lanes
from compress.adapters.recompressed import LIMIT as DELTA_LIMIT
from compress.adapters.stacked import AddProduct, Recompress
from compress.errors import CompressError

RANK, CUT = 16, 8
"""Of the factors, and to which deltas are cut."""
DTYPE = torch.bfloat16
SCALING = 2.0
TOLERANCES = {"merged": 2.0**-8, "cut": 2.0**-12}
"""Half a step of the result's type and what float32 sums are off; of cut deltas of squared norms, hence its square."""

Shape = tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Matrices:
    """Weights and their factors in the host's memory, all of one shape."""

    weights: Sequence[Tensor]
    lefts: Sequence[Tensor]
    rights: Sequence[Tensor]

    @property
    def weight_bytes(self) -> int:
        """Of all weights."""
        return sum(weight.numel() * weight.itemsize for weight in self.weights)

    @property
    def factor_bytes(self) -> int:
        """Of all factors."""
        return sum(factor.numel() * factor.itemsize for factor in (*self.lefts, *self.rights))


def random_matrices(shape: Shape, count: int, seed: int = 0, *, weights: bool = True) -> Matrices:
    """Normal weights and factors, or factors alone."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*size: int) -> Tensor:
        return torch.empty(size, dtype=DTYPE).normal_(0.0, 0.02, generator=generator)

    return Matrices(
        weights=[draw(*shape) for _ in range(count if weights else 0)],
        lefts=[draw(shape[0], RANK) for _ in range(count)],
        rights=[draw(RANK, shape[1]) for _ in range(count)],
    )


def merge_jobs(matrices: Matrices) -> list[Job]:
    """``W + s L R`` of each."""
    operation = AddProduct(scaling=SCALING, stored=DTYPE, in_place=True)
    return [
        Job(
            operation=operation,
            inputs=tuple(Spec(tuple(tensor.shape), tensor.dtype) for tensor in given),
            outputs=(Spec(tuple(given[0].shape), DTYPE),),
            fill=_filling(given),
        )
        for given in zip(matrices.weights, matrices.lefts, matrices.rights, strict=True)
    ]


def cut_jobs(matrices: Matrices) -> list[Job]:
    """Each delta at a smaller rank."""
    jobs = []
    for left, right in zip(matrices.lefts, matrices.rights, strict=True):
        out, into = left.shape[0], right.shape[1]
        jobs.append(
            Job(
                operation=Recompress(rank=CUT),
                inputs=(Spec(tuple(right.shape), DTYPE), Spec(tuple(left.shape), DTYPE)),
                outputs=(Spec((CUT, into), DTYPE), Spec((out, CUT), DTYPE), Spec((2,), torch.float64)),
                fill=_filling((right, left)),
            )
        )
    return jobs


def _filling(sources: Sequence[Tensor]) -> Callable[[Sequence[Tensor]], None]:
    def fill(targets: Sequence[Tensor]) -> None:
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source)

    return fill


def lanes_on(device: torch.device) -> Lanes:
    """The device's lanes; on a CPU the host's, whose times mean nothing."""
    return device_lanes(device) or HostLanes()


def check_merging(device: torch.device, shapes: Sequence[Shape]) -> dict[str, float]:
    """Largest errors of batches of mixed shapes against float64, relative to the size of the terms, by what is made.

    Raises:
        CompressError: A result is wrong, in another place, or another one the second time.
    """
    found = {"merged": 0.0, "cut": 0.0}
    kinds = [random_matrices(shape, 3, seed=seed) for seed, shape in enumerate(shapes)]
    mixed = [each for trio in zip(*map(_each, kinds), strict=True) for each in trio]  # shapes take turns
    together = Matrices(
        weights=[one[0] for one in mixed], lefts=[one[1] for one in mixed], rights=[one[2] for one in mixed]
    )
    limit = together.weight_bytes // 2
    runs = [
        [result[0].clone() for result in run_batched(merge_jobs(together), lanes_on(device), limit=limit)]
        for _ in range(2)
    ]
    for (weight, left, right), result, again in zip(mixed, *runs, strict=True):
        exact = weight.double() + SCALING * (left.double() @ right.double())
        size = weight.double().abs() + SCALING * (left.double().abs() @ right.double().abs())
        found["merged"] = max(found["merged"], float(((result.double() - exact).abs() / size).max()))
        if not torch.equal(result, again):
            raise CompressError("Merged weights change from call to call.", "Report it with this GPU's name.")
    cut = run_batched(cut_jobs(together), lanes_on(device), limit=limit)
    for (_, left, right), (factor_a, factor_b, norms) in zip(mixed, cut, strict=True):
        product = left.double() @ right.double()
        tail = float(torch.linalg.svdvals(product)[CUT:].square().sum())
        size = float(product.square().sum())
        error = float((factor_b.double() @ factor_a.double() - product).square().sum())
        off = max(abs(error - tail), abs(float(norms[0]) - size), abs(float(norms[1]) - tail)) / size
        found["cut"] = max(found["cut"], off)
    for name, error in found.items():
        if error > TOLERANCES[name]:
            raise CompressError(
                f"What was {name} in batches differs from float64 by {error:.2g} of the terms.",
                "Report it with this GPU's name, and compute with --device cpu.",
            )
    return found


def _each(matrices: Matrices) -> list[tuple[Tensor, Tensor, Tensor]]:
    return list(zip(matrices.weights, matrices.lefts, matrices.rights, strict=True))


def copies(device: torch.device, nbytes: int) -> dict[str, float]:
    """Bytes per second of pinned copies to the device and back, one at a time; on a CPU of plain copies."""
    lanes = lanes_on(device)
    host, there = lanes.host(nbytes), lanes.memory(nbytes)
    found = {}
    for name, target, source in (("there", there, host), ("back", host, there)):
        best = min(_seconds(lambda t=target, s=source: t.copy_(s), device) for _ in range(5))  # type: ignore[misc]
        found[name] = nbytes / best
    return found


def merge_case(
    device: torch.device, shape: Shape, count: int, known: dict[str, float], rounds: int
) -> dict[str, dict[str, Any]]:
    """Seconds of merging ``count`` matrices: on the host, on the device one after the other, and in batches."""
    matrices = random_matrices(shape, count)
    jobs = merge_jobs(matrices)

    def on_host() -> None:
        for weight, left, right in _each(matrices):
            add_rounded(weight.clone(), factor_product(right, left, SCALING))

    def alone() -> None:
        for weight, left, right in _each(matrices):
            there = weight.to(device)
            change = factor_product(right.to(device), left.to(device), SCALING)
            there.copy_(change.add_(there))
            there.cpu()

    def batched() -> None:
        _take(run_batched(jobs, lanes_on(device), limit=LIMIT))

    least = max(
        (matrices.weight_bytes + matrices.factor_bytes) / known["there"],
        matrices.weight_bytes / known["back"],
    )
    calls = {"host": on_host, "one by one": alone, "batched": batched}
    return _timed(calls, device, rounds, nbytes=matrices.weight_bytes, least=least)


def cut_case(
    device: torch.device, shape: Shape, count: int, known: dict[str, float], rounds: int
) -> dict[str, dict[str, Any]]:
    """Seconds of cutting ``count`` deltas from rank 16 to 8: on the host, and in batches."""
    matrices = random_matrices(shape, count, weights=False)
    jobs = cut_jobs(matrices)

    def on_host() -> None:
        for left, right in zip(matrices.lefts, matrices.rights, strict=True):
            recompress(right, left, CUT)

    def batched() -> None:
        _take(run_batched(jobs, lanes_on(device), limit=DELTA_LIMIT))

    least = matrices.factor_bytes / known["there"]
    calls = {"host": on_host, "batched": batched}
    return _timed(calls, device, rounds, nbytes=matrices.factor_bytes, least=least)


def _take(results: Iterable[Any]) -> None:
    deque(results, maxlen=0)


def _seconds(call: Callable[[], Any], device: torch.device) -> float:
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        began = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began


def _timed(
    calls: dict[str, Callable[[], None]], device: torch.device, rounds: int, *, nbytes: int, least: float
) -> dict[str, dict[str, Any]]:
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name, call in calls.items():
            took = _seconds(call, device)
            if turn or rounds == 1:  # the first one compiles, loads libraries and pins memory
                seconds[name].append(took)
    return {
        name: {
            "weight_bytes": nbytes,
            "eager_seconds": statistics.median(found),
            "graph_seconds": None,
            "floor_seconds": least,
            "share_of_floor": least / statistics.median(found),
        }
        for name, found in seconds.items()
    }
