"""Merging an adapter into a random model of a published shape: seconds and peak memory.

``python -m compress.benchmarks.merging [--quick] [--shape NAME] [--rank 8] [--device cpu] [--rounds 3] [--work DIR]``

A bf16 checkpoint and a LoRA on every decoder linear are written first, both seeded; ``--work`` keeps them. Then the
adapter is merged as ``recover --merge`` does it, each time in a process of its own on one thread, and one merged
matrix of each shape is compared with the plain formula bit by bit (on a GPU: within a step of bfloat16). Peak memory
is that of the process within the merge, libraries and all. Files come from the page cache where they fit into it.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from compress.adapters.adapter_file import AdapterFile
from compress.adapters.merge import merge_adapter
from compress.benchmarks.protocol import host, versions, write_json
from compress.benchmarks.scale import SHAPES
from compress.benchmarks.scale_model import write_random_adapter, write_random_model
from compress.errors import CompressError
from compress.evaluate.memory import PeakMemory
from compress.model.checkpoint import Checkpoint

TAKES = ("minutes", "minutes")
NEEDS = ()


def measure(folder: Path, device: str) -> dict[str, Any]:
    """One merge in this process, as JSON values.

    Raises:
        CompressError: A merged matrix is not what the formula gives.
    """
    torch.set_num_threads(1)
    full, out = Checkpoint(folder / "full"), folder / "merged"
    shutil.rmtree(out, ignore_errors=True)
    with PeakMemory(device) as peak:
        began = time.monotonic()
        merge_adapter(full, folder / "adapter", out, device=device)
        seconds = time.monotonic() - began
    check(full, folder / "adapter", Checkpoint(out), exact=device == "cpu")
    shutil.rmtree(out)
    return {"seconds": seconds, "peak_bytes": peak.host_bytes, "device_peak_bytes": peak.device_bytes}


def check(full: Checkpoint, adapter: Path, merged: Checkpoint, *, exact: bool) -> None:
    """Compare one merged matrix of each shape with ``W + s B A``.

    Raises:
        CompressError: It is another.
    """
    seen = set()
    with AdapterFile(adapter) as file:
        for module in file.modules:
            name = f"{module}.weight"
            if full.shape(name) in seen:
                continue
            seen.add(full.shape(name))
            factor_a, factor_b = file.factors(module)
            change = torch.mul(factor_b.float() @ factor_a.float(), file.scaling(module).value)
            weight = full.read(name)
            expected, found = (weight.float() + change).to(weight.dtype), merged.read(name)
            same = torch.equal(found, expected)
            if not same and (
                exact or not torch.allclose(found.float(), expected.float(), rtol=2**-7, atol=1e-6)
            ):
                raise CompressError(f"The merged {name} is not W + s B A.", "Report it.")


def main(given: list[str] | None = None) -> int:
    """Command line; the figures are printed last."""
    parser = argparse.ArgumentParser(
        prog="python -m compress.benchmarks.merging", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--quick", action="store_true", help="the shape small")
    parser.add_argument("--shape", choices=tuple(SHAPES), default="1B")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--work", type=Path, help="where the model goes and stays (default: a temporary folder)"
    )
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help="write the rows as JSON to this file")
    arguments = parser.parse_args(given)
    if arguments.one:
        print(json.dumps(measure(arguments.work, arguments.device)))
        return 0
    shape = "small" if arguments.quick else arguments.shape
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.work or Path(temporary)
        full = write_random_model(folder / "full", SHAPES[shape])
        if not (folder / "adapter").is_dir():
            write_random_adapter(folder / "adapter", full, rank=arguments.rank)
        weight_bytes = Checkpoint(full).bytes
        command = [sys.executable, "-m", "compress.benchmarks.merging", "--one", "--work", str(folder)]
        runs = []
        for _ in range(arguments.rounds):
            done = subprocess.run(
                [*command, "--device", arguments.device], capture_output=True, text=True, check=True
            )
            runs.append(json.loads(done.stdout.strip().splitlines()[-1]))
    seconds = statistics.median(run["seconds"] for run in runs)
    row = {
        "seconds": seconds,
        "all_seconds": [run["seconds"] for run in runs],
        "peak_bytes": max(run["peak_bytes"] for run in runs),
        "device_peak_bytes": runs[-1]["device_peak_bytes"],
        "weight_bytes": weight_bytes,
    }
    if arguments.out is not None:
        identity = {
            "benchmark": "merging",
            "shape": shape,
            "rank": arguments.rank,
            "device": arguments.device,
        }
        content = {"identity": identity, "versions": versions(), "host": host(), "rows": {"merge": row}}
        write_json(arguments.out, {"format_version": 1, **content})
    print(
        f"{shape}, {weight_bytes / 1e9:.2f} GB of weights on {arguments.device}: {seconds:.2f} s "
        f"({weight_bytes / seconds / 1e9:.2f} GB/s), peak {row['peak_bytes'] / 1e9:.2f} GB"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
