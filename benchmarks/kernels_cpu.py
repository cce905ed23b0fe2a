"""Speed of the C kernels against bitsandbytes, HQQ, torch's int4 product and dense products, with a roofline account.

``python -m compress.benchmarks.kernels_cpu [--quick] [--part NAME] [--threads N] [--level LEVEL] [--out FILE]``

All contestants run in this process, in turns: one call each, then the next round; at least 20 rounds. A call meets
weights that no cache holds any more: copies of more than 128 MB are gone through. A row has the median and the tenth
and ninetieth percentile of the seconds of each contestant, and of the ratio to ours within the same round.
Parts: ``linear`` (4-, 3- and 2-bit NormalFloat, blocks of 64, double quantization, bfloat16 input, no gradients),
``dequantize``, ``quantize`` (plain rounding of float32), ``training`` (forward and backward of a 4-bit linear with
trained factors of rank 64), ``model`` and ``memory`` (SmolLM2-135M, its decoder linears in 3 bits; see
kernels_cpu_model.py).

Peers come from the environments of ``make peers PEERS="bitsandbytes hqq"``, whose folders are put at the end of this
process's path: the same torch serves everybody. A peer that is not there is left out, and the row says who was there.
The account of a row: bytes of weights and multiplications of one call, and how long they take at the bandwidth and
the peak measured here, on as many threads. Run it on an idle machine; ``--quick`` only shows that everything runs.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from compress.benchmarks import kernels_cpu_cases
from compress.benchmarks.kernels_cpu_cases import (
    DTYPE,
    SHAPES,
    Contestant,
    add_peers,
    dequantize_case,
    linear_case,
    quantize_case,
    training_case,
)
from compress.benchmarks.kernels_cpu_model import memory_case, model_case
from compress.benchmarks.protocol import Rows
from compress.kernels.ceilings import bandwidth, multiplications
from compress.kernels.library import LEVELS, status, using

TAKES = ("minutes", "minutes")
NEEDS = ()

ROUNDS = 21
TOKENS = (1, 8, 64, 256)
TRAINING_TOKENS = 256
PARTS = ("linear", "dequantize", "quantize", "training", "model", "memory")
Make = Callable[[tuple[int, int], Sequence[str]], dict[str, Contestant]]
QUICK_SHAPES = ((256, 320), (320, 256))


def interleaved(contestants: Mapping[str, Contestant], rounds: int) -> dict[str, list[float]]:
    """Seconds of every call, round by round, each contestant once a round.

    Before that every copy is called once: bitsandbytes repacks its weights in their first call.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for contestant in contestants.values():
        for call in contestant.calls:
            call()
    for round_ in range(rounds):
        for name, contestant in contestants.items():
            call = contestant.calls[round_ % len(contestant.calls)]
            began = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - began)
    return seconds


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, and tenth and ninetieth percentile."""
    cuts = statistics.quantiles(values, n=10, method="inclusive")
    return {"median": statistics.median(values), "p10": cuts[0], "p90": cuts[-1]}


def measured(contestants: Mapping[str, Contestant], ours: Sequence[str], rounds: int) -> dict[str, Any]:
    """Seconds of everybody, and everybody's seconds over those of each of ``ours`` in the same round."""
    seconds = interleaved(contestants, rounds)
    return {
        "rounds": rounds,
        "seconds": {name: spread(values) for name, values in seconds.items()},
        "times_ours": {
            f"{other} / {name}": spread([b / a for a, b in zip(seconds[name], seconds[other], strict=True)])
            for name in ours
            for other in seconds
            if other != name
        },
    }


def account(contestant: Contestant, products: int, ceilings: Mapping[str, float]) -> dict[str, float]:
    """Bytes and multiplications of a call, and the seconds that each would take alone at the measured ceilings."""
    return {
        "weight_bytes": contestant.weight_bytes,
        "multiplications": products,
        "seconds_at_bandwidth": contestant.weight_bytes / ceilings["bytes_per_second"],
        "seconds_at_peak": products / ceilings["multiplications_per_second"],
    }


def ceilings_here() -> dict[str, float]:
    """What this machine can do at most on the present number of threads."""
    return {"bytes_per_second": bandwidth(), "multiplications_per_second": multiplications(DTYPE)}


def benchmark(rows: Rows, *, parts: Sequence[str], threads: int, peers: Sequence[str], quick: bool) -> None:
    """Measure what the file lacks, one row a case."""
    torch.set_num_threads(threads)
    shapes, rounds = (QUICK_SHAPES, 5) if quick else (SHAPES, ROUNDS)
    suffix = f"{threads} threads"
    if not rows.has(f"ceilings, {suffix}"):
        rows.put(f"ceilings, {suffix}", ceilings_here())
    ceilings = rows.get(f"ceilings, {suffix}")
    for shape in shapes:
        size = f"{shape[0]} x {shape[1]}"
        for tokens in TOKENS if "linear" in parts else ():
            key = f"linear, {size}, {tokens} tokens, {suffix}"
            if not rows.has(key):
                case = linear_case(shape, tokens, peers)
                row = measured(case, ("nf4", "nf3", "nf2"), rounds)
                products = tokens * shape[0] * shape[1]
                ours = {name: account(case[name], products, ceilings) for name in ("nf4", "nf3", "nf2")}
                rows.put(key, {**row, "peers": list(peers), "account": ours})
        made: Mapping[str, Make] = {
            "dequantize": dequantize_case,
            "quantize": quantize_case,
            "training": _training,
        }
        for part, make in made.items():
            key = f"{part}, {size}, {suffix}"
            if part in parts and not rows.has(key):
                rows.put(key, {**measured(make(shape, peers), ("nf4",), rounds), "peers": list(peers)})
    if "memory" in parts and not rows.has("memory"):
        rows.put("memory", {"resident_growth": memory_case(peers), "peers": list(peers)})
    if "model" in parts and not rows.has(f"model, {suffix}"):
        rows.put(f"model, {suffix}", {**model_case(peers, quick=quick), "peers": list(peers)})


def _training(shape: tuple[int, int], peers: Sequence[str]) -> dict[str, Contestant]:
    return training_case(shape, TRAINING_TOKENS, peers)


def report(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Milliseconds of every contestant and the ratios to ours, row by row."""
    lines = []
    for key, row in rows.items():
        lines.append(key)
        if "seconds" not in row:
            lines += [f"  {name}: {_words(value)}" for name, value in row.items() if name != "peers"]
            continue
        for name, found in row["seconds"].items():
            ratio = row["times_ours"].get(f"{name} / nf4")
            more = (
                ""
                if ratio is None
                else f"  {ratio['median']:.2f} x nf4 [{ratio['p10']:.2f}, {ratio['p90']:.2f}]"
            )
            lines.append(f"  {name:32} {1e3 * found['median']:9.3f} ms{more}")
        for name, found in row.get("account", {}).items():
            floors = (1e3 * found["seconds_at_bandwidth"], 1e3 * found["seconds_at_peak"])
            lines.append(f"  {name}: {floors[0]:.3f} ms at the bandwidth, {floors[1]:.3f} ms at the peak")
    return "\n".join(lines)


def _words(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {number:.4g}" for name, number in value.items())
    return f"{value:.4g}"


def main() -> int:
    """Command line; the figures are printed last."""
    parser = argparse.ArgumentParser(
        prog="python -m compress.benchmarks.kernels_cpu", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--quick", action="store_true", help="small matrices and few rounds")
    parser.add_argument("--part", action="append", choices=PARTS, help="one or more; all when not given")
    parser.add_argument("--threads", type=int, action="append", help="one or more; 1 and 2 when not given")
    parser.add_argument("--level", choices=LEVELS, help="the best this processor has when not given")
    parser.add_argument(
        "--out", type=Path, help="JSON file of the figures; one that is there is gone on with"
    )
    arguments = parser.parse_args()
    level = arguments.level or status().level
    identity = {
        "benchmark": "kernels on the CPU",
        "quick": arguments.quick,
        "level": level,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "dtype": str(DTYPE),
    }
    if arguments.quick:
        kernels_cpu_cases.ROTATED = 1 << 20  # of small matrices, 128 MB would be thousands
    torch.set_num_threads(max(arguments.threads or (1, 2)))
    with tempfile.TemporaryDirectory() as folder, using(level):
        rows = Rows(arguments.out or Path(folder) / "kernels-cpu.json", identity)
        for threads in arguments.threads or (1, 2):
            benchmark(
                rows,
                parts=arguments.part or PARTS,
                threads=threads,
                peers=add_peers(),
                quick=arguments.quick,
            )
    print(report(rows.rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
