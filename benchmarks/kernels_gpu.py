"""Speed of the GPU kernels against cuBLAS, bitsandbytes and gemlite, with the roofline floor beside each figure.

``python -m compress.benchmarks.kernels_gpu [--quick] [--part NAME] [--peer NAME] [--shape OUTxIN] [--tokens N]
[--seconds N] [--write-table] [--out FILE]``

First the kernels are checked against float64 products of the weights that torch dequantizes; a deviation ends the
run. Then everybody takes turns, on copies of the weights that exceed 200 MB together, so that no cache holds them:
``linear`` (4, 3, 2 and 8 bits, blocks of 64, double quantization, bfloat16; as a kernel and as a module; with factors
of rank 64), ``dequantize``, ``backward``, ``groups`` (q, k and v, or gate and up, in one launch), ``merge`` (adapters
added to weights of the host, and deltas cut to a rank, in batches; checked like the kernels before). Seconds are
medians, eager and from a CUDA graph. A floor is the bytes of the packed weights over the bandwidth measured here, or
the operations over the measured peak, whichever is longer; of merging, the bytes that cross over the bandwidth of
pinned copies. What the time limit leaves out is listed, never guessed.

``--write-table`` has the part ``table`` run, which measures which kernel is fastest where and writes it beside the
default table, for GPUs of this name. Without a GPU only ``--quick`` runs: tiny matrices in Triton's interpreter, whose
times mean nothing.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from compress.benchmarks.kernels_gpu_merge import check_merging, copies, cut_case, merge_case
from compress.benchmarks.protocol import Rows
from compress.kernels.triton.launch import installed, interpreted

TAKES = ("minutes", "minutes")
NEEDS = ("gpu",)

PEERS = ("bitsandbytes", "gemlite")
PARTS = ("linear", "dequantize", "backward", "groups", "merge", "table")
SHAPES = ((11008, 4096), (4096, 11008), (4096, 4096))
"""[out, in]; the first two have 45 M weights."""
TOKENS = (1, 16, 32, 64, 128, 256, 2048)
WIDTHS = (4, 3, 2, 8)
ROTATED = 200 << 20
ROUNDS = 11
SECONDS = 420.0
"""After which no further case begins."""
GROUPS = {"q, k, v": ((4096, 4096),) * 3, "gate, up": ((11008, 4096),) * 2}
QUICK_SHAPE = (48, 96)
MERGED = {(4096, 4096): 24, (11008, 4096): 8, (576, 576): 200}
"""Shapes that are merged together, and how many matrices of each."""


def floor(weight_bytes: int, operations: float, ceilings: Mapping[str, float]) -> float:
    """Seconds that no way of computing it can be under, at the measured ceilings."""
    return max(weight_bytes / ceilings["bytes_per_second"], operations / ceilings["operations_per_second"])


def with_floors(
    found: Mapping[str, Mapping[str, Any]], operations: float, ceilings: Mapping[str, float]
) -> dict[str, dict[str, Any]]:
    """Every contestant with its floor, and how much of it its best time reaches."""
    rows = {}
    for name, row in found.items():
        rows[name] = dict(row)
        if "failed" not in row:
            least = floor(row["weight_bytes"], operations, ceilings)
            best = row["graph_seconds"] or row["eager_seconds"]
            rows[name] |= {"floor_seconds": least, "share_of_floor": least / best}
    return rows


def benchmark(
    rows: Rows,
    device: torch.device,
    *,
    parts: Sequence[str],
    seconds: float,
    quick: bool,
    save: Path | None,
    wanted: Sequence[str] = PEERS,
    shapes: Sequence[tuple[int, int]] = SHAPES,
    tokens: Sequence[int] = TOKENS,
) -> list[str]:
    """Measure what the file lacks, one row a case; returns the cases that time did not allow.

    Raises:
        CompressError: A kernel's result is wrong.
    """
    from compress.benchmarks import kernels_gpu_cases as cases
    from compress.benchmarks.kernels_gpu_clock import ceilings, extra_bytes, measured

    deadline = time.monotonic() + seconds
    setting = cases.Setting(device=device, rotated=0 if quick else ROTATED)
    rounds, widths = (1, (3,)) if quick else (ROUNDS, WIDTHS)
    if quick:
        shapes, tokens = (QUICK_SHAPE,), (1, 20)
    peers = [] if quick else cases.peers_here(wanted)
    left_out: list[str] = []

    def due(key: str) -> bool:
        if rows.has(key):
            return False
        if time.monotonic() > deadline:
            left_out.append(key)
            return False
        return True

    if not rows.has("checks"):
        shape = QUICK_SHAPE if quick else (520, 1000)
        rows.put("checks", cases.check_products(device, shape, (1, 17) if quick else (1, 16, 17, 64, 300)))
    if "merge" in parts and not rows.has("checks of merging"):
        mixed = ((24, 40), (40, 24)) if quick else ((1024, 1536), (576, 1536), (1000, 520))
        rows.put("checks of merging", check_merging(device, mixed))
    if not rows.has("ceilings"):
        rows.put("ceilings", ceilings(device, quick=quick))
    known = rows.get("ceilings")
    for count in tokens if "linear" in parts else ():
        for shape in shapes:
            key, operations = (
                f"linear, {shape[0]} x {shape[1]}, {count} tokens",
                2.0 * count * shape[0] * shape[1],
            )
            if due(key):
                made = cases.linear_case(setting, shape, count, widths, peers)
                row: dict[str, Any] = with_floors(measured(made, device, rounds), operations, known)
                own = made[f"nf{widths[0]}"].calls[0]
                rows.put(key, {"contestants": row, "extra_bytes": extra_bytes(own, device), "peers": peers})
    for shape in shapes if "dequantize" in parts else ():
        if due(key := f"dequantize, {shape[0]} x {shape[1]}"):
            found = measured(cases.dequantize_case(setting, shape, widths), device, rounds)
            rows.put(key, {"contestants": with_floors(found, 0.0, known)})
    for shape in shapes[:1] if "backward" in parts else ():
        for count in tokens:
            if due(key := f"backward, {shape[0]} x {shape[1]}, {count} tokens"):
                found = measured(cases.backward_case(setting, shape, count, widths), device, rounds)
                rows.put(key, {"contestants": with_floors(found, 2.0 * count * shape[0] * shape[1], known)})
    groups = {"quick": ((32, 96), (16, 96))} if quick else GROUPS
    for name, group in groups.items() if "groups" in parts else ():
        if due(key := f"group {name}, 1 token"):
            found = measured(cases.group_case(setting, group, 1), device, rounds)
            operations = 2.0 * sum(shape[0] * shape[1] for shape in group)
            rows.put(key, {"contestants": with_floors(found, operations, known)})
    if "merge" in parts:
        left_out += _merging(rows, device, deadline, quick=quick)
    if "table" in parts and due("table"):
        rows.put("table", _table(setting, shapes[0], deadline, quick=quick, save=save))
    return left_out


def _merging(rows: Rows, device: torch.device, deadline: float, *, quick: bool) -> list[str]:
    """The part ``merge``; returns the cases that time did not allow."""
    if not rows.has("copies"):
        rows.put("copies", copies(device, 1 << 20 if quick else 1 << 28))
    known, left_out = rows.get("copies"), []
    for shape, count in ({QUICK_SHAPE: 5} if quick else MERGED).items():
        for name, case in (("merge", merge_case), ("cut", cut_case)):
            key = f"{name}, {count} x {shape[0]} x {shape[1]}"
            if rows.has(key):
                continue
            if time.monotonic() > deadline:
                left_out.append(key)
                continue
            rows.put(key, {"contestants": case(device, shape, count, known, 1 if quick else 5)})
    return left_out


def _table(
    setting: Any, shape: tuple[int, int], deadline: float, *, quick: bool, save: Path | None
) -> dict[str, Any]:
    from compress.benchmarks.kernels_gpu_table import CANDIDATES, measured_table
    from compress.benchmarks.roofline import WIDTHS as ALL_WIDTHS
    from compress.benchmarks.roofline import table_text
    from compress.kernels.triton.choice import slug

    name, processors = "the interpreter", 2
    if setting.device.type == "cuda":
        found = torch.cuda.get_device_properties(setting.device)
        name, processors = found.name, found.multi_processor_count
    table = measured_table(
        setting,
        shape,
        processors,
        name=name,
        deadline=deadline,
        candidates=CANDIDATES[:1] if quick else CANDIDATES,
        widths=(4,) if quick else ALL_WIDTHS,
    )
    if save is not None:
        save.mkdir(parents=True, exist_ok=True)
        (save / f"{slug(name)}.json").write_text(table_text(table), encoding="utf-8")
    return table


def report(rows: Mapping[str, Mapping[str, Any]], left_out: Sequence[str]) -> str:
    """Microseconds of every contestant, eager and from a graph, and its floor, row by row."""
    lines = []
    for key, row in rows.items():
        lines.append(key)
        if key == "checks":
            lines.append(f"  largest error {max(row.values()):.2g} of the terms, {len(row)} products")
        elif key == "checks of merging":
            lines += [f"  {name:8} largest error {error:.2g} of the terms" for name, error in row.items()]
        elif key == "copies":
            lines.append(f"  {row['there'] / 1e9:.1f} GB/s to the device, {row['back'] / 1e9:.1f} GB/s back")
        elif key == "ceilings":
            lines.append(
                f"  {row['bytes_per_second'] / 1e12:.2f} TB/s copied, "
                f"{row['operations_per_second'] / 1e12:.0f} T bfloat16 operations/s"
            )
        for name, found in row.get("contestants", {}).items():
            if "failed" in found:
                lines.append(f"  {name:18} failed: {found['failed']}")
                continue
            graph = found["graph_seconds"]
            lines.append(
                f"  {name:18} eager {1e6 * found['eager_seconds']:9.1f} us"
                + (f", graph {1e6 * graph:9.1f} us" if graph is not None else "")
                + f", floor {1e6 * found['floor_seconds']:8.1f} us ({found['share_of_floor']:.0%})"
            )
        if row.get("extra_bytes") is not None:
            lines.append(f"  beside the result: {row['extra_bytes'] / 2**20:.1f} MB")
    lines += [f"not measured, the time was up: {key}" for key in left_out]
    return "\n".join(lines)


def _shape(text: str) -> tuple[int, int]:
    rows, columns = text.split("x")
    return int(rows), int(columns)


def in_the_interpreter(arguments: Sequence[str]) -> int:
    """The same command in a process that has the interpreter from its start."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "COMPRESS_KERNELS": "triton"}
    command = [sys.executable, "-m", "compress.benchmarks.kernels_gpu", *arguments]
    return subprocess.run(command, env=environment, check=False).returncode


def main(given: Sequence[str] | None = None) -> int:
    """Command line; the figures are printed last."""
    parser = argparse.ArgumentParser(
        prog="python -m compress.benchmarks.kernels_gpu", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument(
        "--quick", action="store_true", help="tiny matrices; without a GPU in the interpreter"
    )
    parser.add_argument(
        "--part", action="append", choices=PARTS, help="one or more; all but table when not given"
    )
    parser.add_argument(
        "--peer", action="append", choices=PEERS, help="one or more; all that are installed when not given"
    )
    parser.add_argument("--shape", action="append", type=_shape, help="of matrices, OUTxIN; one or more")
    parser.add_argument("--tokens", action="append", type=int, help="of a product; one or more")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="after which no further case begins")
    parser.add_argument("--write-table", action="store_true", help="measure and write the table for this GPU")
    parser.add_argument(
        "--out", type=Path, help="JSON file of the figures; one that is there is gone on with"
    )
    arguments = parser.parse_args(given)
    if not installed():
        print("This benchmark needs triton: pip install 'compress-llm[cuda]'.", file=sys.stderr)
        return 2
    cuda = torch.cuda.is_available()
    if not cuda and not arguments.quick:
        print("This benchmark needs a CUDA device; --quick runs in Triton's interpreter.", file=sys.stderr)
        return 2
    if not cuda and not interpreted():
        return in_the_interpreter(sys.argv[1:] if given is None else given)
    from compress.kernels.triton.choice import TABLES

    device = torch.device("cuda", 0) if cuda else torch.device("cpu")
    identity = {
        "benchmark": "kernels on the GPU",
        "quick": arguments.quick,
        "device": torch.cuda.get_device_name(0) if cuda else "Triton's interpreter; its times mean nothing",
    }
    parts = list(arguments.part or PARTS[:-1]) + (["table"] if arguments.write_table else [])
    with tempfile.TemporaryDirectory() as folder:
        rows = Rows(arguments.out or Path(folder) / "kernels-gpu.json", identity)
        left_out = benchmark(
            rows,
            device,
            parts=parts,
            seconds=arguments.seconds,
            quick=arguments.quick,
            save=TABLES if arguments.write_table and cuda else None,
            wanted=arguments.peer or PEERS,
            shapes=arguments.shape or SHAPES,
            tokens=arguments.tokens or TOKENS,
        )
        print(report(rows.rows, left_out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
