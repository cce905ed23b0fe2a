"""The CUDA kernels for few tokens in turns: what streaming through shared memory and early starts gain.

``python -m compress.benchmarks.few_tokens [--quick] [--variant NAME] [--build] [--no-check] [--seconds N]
[--out FILE]``

The variants are in `few_tokens_variants.py`. Each is compared with float64 first, in a process of its own: sums, 40
calls that must repeat to the bit, and a graph of four; what fails is not timed, and the exit code is 1. Then everybody
takes turns on copies of the weights that exceed 200 MB together, in CUDA graphs that go through all of them. ``queued``
is of two replays that the host has queued behind a busy GPU; ``alone`` of one on an idle GPU, the host's launch of the
graph within, as `kernels_gpu` measures. Seconds are medians. A floor is all bytes that a call must move over the
bandwidth of a copy measured here. ``layer`` is the products of a LLaMA-7B layer (q, k, v, o, gate, up, down) one after
the other.

``--build`` only compiles, for compute capability 9.0, and needs no GPU; ``$COMPRESS_CACHE`` keeps what is compiled.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from compress.benchmarks.few_tokens_variants import (
    VARIANTS,
    Sizes,
    caller,
    kernel_of,
    operands,
)
from compress.benchmarks.protocol import Rows
from compress.errors import CompressError
from compress.kernels.cuda.compiler import build, nvrtc
from compress.kernels.cuda.launch import architecture
from compress.quantize.native_form import geometry

TAKES = ("minutes", "minutes")
NEEDS = ("gpu",)

ROTATED = 200 << 20
ROUNDS = 21
SECONDS = 240.0
"""After which no further case begins."""
PROCESSORS = 132
"""Of an H100, for which --build chooses instances."""
WIDE, HIGH, SQUARE = (4096, 11008), (11008, 4096), (4096, 4096)
LAYER = (SQUARE, SQUARE, SQUARE, SQUARE, HIGH, HIGH, WIDE)


def _sizes(shape: tuple[int, int], bits: int, tokens: int, rank: int = 0, **more: int) -> Sizes:
    return Sizes(rows=shape[0], columns=shape[1], bits=bits, tokens=tokens, rank=rank, **more)


CHECKS = (
    _sizes((256, 512), 4, 1),
    _sizes(SQUARE, 4, 1),
    _sizes(WIDE, 4, 1, 64),
    _sizes(HIGH, 4, 16, 64),
    _sizes(HIGH, 4, 1),
    _sizes(HIGH, 2, 8),
    _sizes(SQUARE, 3, 5),
    _sizes(SQUARE, 8, 16),
    _sizes(SQUARE, 4, 8, block=32),
    _sizes(SQUARE, 4, 1, scale_bits=4, block=128),
    _sizes((1000, 1160), 3, 9, 24, scale_bits=3, block=128, group=64),
    _sizes((514, 1160), 4, 1, scale_bits=4, group=1 << 20),
    _sizes((38, 96), 2, 3, 8, scale_bits=2, block=32, group=16),
    _sizes((48, 88), 8, 16, group=16),
    _sizes((30000, 512), 4, 1, 64),
    _sizes((30000, 512), 4, 12, 256),
)
TIMES = (
    _sizes((4224, 128), 4, 1),
    *(_sizes(HIGH, bits, tokens) for bits in (4, 2, 3) for tokens in (1, 8, 16)),
    *(_sizes(WIDE, bits, tokens) for bits in (4, 2, 3) for tokens in (1, 16)),
    *(_sizes(SQUARE, bits, tokens) for bits in (4, 2) for tokens in (1, 16)),
    *(_sizes(shape, 4, tokens, 64) for shape in (HIGH, WIDE, SQUARE) for tokens in (1, 16)),
)
QUICK = (_sizes(HIGH, 4, 1), _sizes(HIGH, 4, 16), _sizes(HIGH, 4, 1, 64), _sizes(HIGH, 2, 1))

Calls = Sequence[Callable[[], Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """A contestant's graph.

    Attributes:
        graph: Of all calls.
        calls: They keep the memory that the graph uses.
        count: What a replay's seconds are divided by.
    """

    graph: torch.cuda.CUDAGraph
    calls: Calls
    count: int


def instances(names: Iterable[str], times: Sequence[Sizes], processors: int) -> list[tuple[str, str]]:
    """Sources, and every instance of their kernels that checks and times need."""
    layer = [_sizes(shape, 4, 1, rank) for shape in set(LAYER) for rank in (0, 64)]
    found: dict[tuple[str, str], None] = {}
    for name in names:
        for sizes in (*CHECKS, *times, *layer):
            g = geometry((sizes.rows, sizes.columns), sizes.config)
            found[kernel_of(VARIANTS[name], g, sizes.tokens, sizes.rank, processors)] = None
    return list(found)


def compile_one(arch: str, job: tuple[str, str]) -> None:
    """Build one of :func:`instances`."""
    build(*job, arch)


def compile_all(jobs: Sequence[tuple[str, str]], arch: str) -> None:
    """On all cores.

    Raises:
        CompressError: One does not compile.
    """
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        list(pool.map(partial(compile_one, arch), jobs))


def compared(name: str, sizes: Sizes, seed: int) -> dict[str, Any]:
    """One product against float64.

    Returns:
        ``error``: the norm of the deviation over that of the product; ``outside``: results further off than rounding
        to bfloat16 and 4e-6 of their terms' sizes; ``repeats`` and ``repeats_in_graph``.
    """
    variant, of = VARIANTS[name], operands(sizes, torch.device("cuda", 0), seed)
    wide, weights = of.x.double(), of.weights()
    exact, magnitude = wide @ weights.T, wide.abs() @ weights.abs().T
    near = True
    call, first_call = caller(variant, of), caller(variant, of, waits=True)
    y, sums = (tensor.clone() for tensor in first_call())
    if of.factors is not None:
        left, right = (factor.double() for factor in of.factors)
        inner, terms = wide @ right.T, wide.abs() @ right.abs().T
        exact, magnitude = exact + inner @ left, magnitude + 8 * terms @ left.abs()
        near = bool(((sums.double() - inner).abs() <= 4e-6 * terms).all())
    fine = (y.double() - exact).abs() <= 2.0**-8 * exact.abs() + 4e-6 * magnitude
    torch.cuda.synchronize()
    repeats = True
    for _ in range(20):
        call()[0].fill_(torch.nan)
        again, again_sums = call()
        repeats = repeats and torch.equal(again, y) and torch.equal(again_sums, sums)
    others = [caller(variant, of.copied()) for _ in range(4)]
    torch.cuda.synchronize()
    graph, results = captured(others)
    for result, _ in results:
        result.fill_(torch.nan)
    for _ in range(5):
        graph.replay()
    torch.cuda.synchronize()
    return {
        "error": float((y.double() - exact).norm() / exact.norm()),
        "outside": int((~fine).sum()) + (not near),
        "repeats": repeats,
        "repeats_in_graph": all(torch.equal(a, y) and torch.equal(b, sums) for a, b in results),
    }


def check(name: str) -> dict[str, Any]:
    """A variant's row of :data:`CHECKS`; none comes after an error, with which the GPU's context may be lost."""
    row: dict[str, Any] = {"products": len(CHECKS), "passed": 0, "largest_error": 0.0, "failed": {}}
    for seed, sizes in enumerate(CHECKS):
        try:
            found = compared(name, sizes, seed)
        except (CompressError, RuntimeError) as error:
            row["failed"][str(sizes)] = {"problem": f"{type(error).__name__}: {error}"[:400]}
            break
        row["largest_error"] = max(row["largest_error"], found["error"])
        if found["outside"] or not found["repeats"] or not found["repeats_in_graph"]:
            row["failed"][str(sizes)] = found
        else:
            row["passed"] += 1
    return row


def check_apart(name: str) -> dict[str, Any]:
    """:func:`check` in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        try:
            return pool.submit(check, name).result()
        except BrokenProcessPool as error:
            failed = {"all": {"problem": f"the process ended: {error}"}}
            return {"products": len(CHECKS), "passed": 0, "largest_error": 0.0, "failed": failed}


def captured(calls: Calls) -> tuple[torch.cuda.CUDAGraph, list[Any]]:
    """The calls as a graph, and what they return; all have run before."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = [call() for call in calls]
    return graph, results


def replay_of(calls: Calls, count: int) -> Replay:
    """The calls captured, to be timed."""
    return Replay(graph=captured(calls)[0], calls=calls, count=count)


def queued_seconds(graph: torch.cuda.CUDAGraph, *, busy: bool) -> float:
    """Seconds of a replay: of two that wait behind a busy GPU, or of one on an idle GPU, its launch within."""
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    count = 2 if busy else 1
    if busy:
        torch.cuda._sleep(150_000)
    start.record()
    for _ in range(count):
        graph.replay()
    stop.record()
    stop.synchronize()
    return float(start.elapsed_time(stop)) / 1e3 / count


def timed(replays: Mapping[str, Replay], floor: float, rounds: int) -> dict[str, dict[str, float]]:
    """Everybody in turns: median, least and most seconds of a call, and the share that the floor is of it."""
    taken: dict[str, dict[str, list[float]]] = {name: {"queued": [], "alone": []} for name in replays}
    for replay in replays.values():
        queued_seconds(replay.graph, busy=True)
    for _ in range(rounds):
        for name, replay in replays.items():
            for way, found in taken[name].items():
                found.append(queued_seconds(replay.graph, busy=way == "queued") / replay.count)
    return {name: summary(ways, floor) for name, ways in taken.items()}


def summary(ways: Mapping[str, Sequence[float]], floor: float) -> dict[str, float]:
    """The figures of one contestant, from its seconds."""
    row = {}
    for way, found in ways.items():
        row[f"{way}_seconds"] = statistics.median(found)
        row[f"{way}_least_seconds"], row[f"{way}_most_seconds"] = min(found), max(found)
    return row | {"share_of_floor": floor / row["queued_seconds"]}


def time_case(sizes: Sizes, names: Sequence[str], rate: float, rounds: int) -> dict[str, Any]:
    """One product by everybody, and by cuBLAS in bfloat16 where the codes have 4 bits and nothing is added."""
    device = torch.device("cuda", 0)
    of = operands(sizes, device, 0)
    copies = [of.copied() for _ in range(min(64, 1 + ROTATED // of.nbytes))]
    replays = {n: replay_of([caller(VARIANTS[n], one) for one in copies], len(copies)) for n in names}
    if sizes.bits == 4 and not sizes.rank and sizes.rows * sizes.columns >= SQUARE[0] * SQUARE[1]:
        dense = torch.randn(sizes.rows, sizes.columns, device=device).bfloat16()
        held = [dense.clone() for _ in range(1 + ROTATED // dense.nbytes)]
        calls = [partial(torch.nn.functional.linear, of.x, weight) for weight in held]
        replays["cuBLAS bfloat16"] = replay_of(calls, len(calls))
    moved = of.nbytes + of.x.nbytes + 2 * sizes.tokens * sizes.rows
    found = timed(replays, moved / rate, rounds)
    return {"moved_bytes": moved, "floor_seconds": moved / rate, "contestants": found}


def time_layer(rank: int, names: Sequence[str], rate: float, rounds: int) -> dict[str, Any]:
    """All products of two layers with weights of their own, one token; seconds of a layer."""
    shapes = [_sizes(shape, 4, 1, rank) for shape in LAYER] * 2
    made = [operands(sizes, torch.device("cuda", 0), seed) for seed, sizes in enumerate(shapes)]
    replays = {n: replay_of([caller(VARIANTS[n], of) for of in made], 2) for n in names}
    small = [of.x.nbytes + 2 * of.matrix.geometry.rows for of in made]
    moved = (sum(of.nbytes for of in made) + sum(small)) // 2
    found = timed(replays, moved / rate, rounds)
    return {"moved_bytes": moved, "floor_seconds": moved / rate, "contestants": found}


def benchmark(
    rows: Rows, names: Sequence[str], times: Sequence[Sizes], *, checks: bool, seconds: float
) -> list[str]:
    """Measure what the file lacks; returns the cases that time did not allow."""
    from compress.benchmarks.kernels_gpu_clock import ceilings

    deadline, good = time.monotonic() + seconds, []
    for name in names:
        key = f"checks, {name}"
        if checks and not rows.has(key):
            rows.put(key, check_apart(name))
        if not rows.has(key) or not rows.get(key)["failed"]:
            good.append(name)
    if not rows.has("ceilings"):
        rows.put("ceilings", ceilings(torch.device("cuda", 0)))
    rate, left_out = rows.get("ceilings")["bytes_per_second"], []
    cases: dict[str, Callable[[], dict[str, Any]]] = {
        str(sizes): partial(time_case, sizes, good, rate, ROUNDS) for sizes in times
    }
    cases |= {f"layer, rank {rank}": partial(time_layer, rank, good, rate, ROUNDS) for rank in (0, 64)}
    for key, case in cases.items():
        if rows.has(key):
            continue
        if time.monotonic() > deadline:
            left_out.append(key)
        else:
            with torch.no_grad():
                rows.put(key, case())
    return left_out


def report(rows: Mapping[str, Mapping[str, Any]], left_out: Sequence[str]) -> str:
    """Checks, and microseconds of everybody."""
    lines = []
    for key, row in rows.items():
        if "products" in row:
            lines.append(f"{key}: {row['passed']} of {row['products']}, error {row['largest_error']:.2g}")
            lines += [f"  {sizes}: {why}" for sizes, why in row["failed"].items()]
        elif "contestants" in row:
            lines.append(f"{key}: floor {1e6 * row['floor_seconds']:.2f} us")
            for name, found in row["contestants"].items():
                lines.append(
                    f"  {name:24} queued {1e6 * found['queued_seconds']:7.2f} us "
                    f"({found['share_of_floor']:.0%} of the floor), alone {1e6 * found['alone_seconds']:7.2f} us"
                )
    return "\n".join([*lines, *(f"not measured, the time was up: {key}" for key in left_out)])


def main(given: Sequence[str] | None = None) -> int:
    """Command line; the figures are printed last."""
    parser = argparse.ArgumentParser(
        prog="python -m compress.benchmarks.few_tokens", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--quick", action="store_true", help="four cases to time, and the layers")
    parser.add_argument(
        "--variant", action="append", choices=VARIANTS, help="one or more; all when not given"
    )
    parser.add_argument("--build", action="store_true", help="compile only")
    parser.add_argument("--no-check", action="store_true", help="time at once")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="after which no further case begins")
    parser.add_argument(
        "--out", type=Path, help="JSON file of the figures; one that is there is gone on with"
    )
    arguments = parser.parse_args(given)
    names, times = arguments.variant or list(VARIANTS), QUICK if arguments.quick else TIMES
    if not arguments.build and (not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0)):
        print(
            "This benchmark needs a CUDA device of compute capability 9.0; --build does not.", file=sys.stderr
        )
        return 2
    if nvrtc() is None:
        print("This benchmark needs NVRTC: pip install nvidia-cuda-nvrtc.", file=sys.stderr)
        return 2
    if arguments.build:
        jobs = instances(names, times, PROCESSORS)
        compile_all(jobs, "sm_90a")
        print(f"{len(jobs)} instances compiled for sm_90a")
        return 0
    arch = architecture(*torch.cuda.get_device_capability())
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    compile_all(instances(names, times, processors), arch)
    identity = {"benchmark": "few tokens", "device": torch.cuda.get_device_name(), "rounds": ROUNDS}
    with tempfile.TemporaryDirectory() as folder:
        rows = Rows(arguments.out or Path(folder) / "few-tokens.json", identity)
        left_out = benchmark(rows, names, times, checks=not arguments.no_check, seconds=arguments.seconds)
        print(report(rows.rows, left_out))
        return int(any(row.get("failed") for row in rows.rows.values()))


if __name__ == "__main__":
    sys.exit(main())
