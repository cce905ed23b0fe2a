"""Recovery of an adapter with the shapes of LLaMA-2-70B: seconds, peak memory, bytes.

``python -m compress.benchmarks.loram_recover [--quick] [--rank 8] [--dtype bfloat16] [--work DIR] [--out FILE]``

The structure is LoRAM's at a ratio of 0.85 (arXiv 2502.13533): 2 of 8 KV groups and 4300 of 28672 channels in every
layer but the first four and last two, at random. The adapter is on all seven projections and the output matrix, random
numbers in ``--dtype``. It is recovered three times, each in a process of its own on one thread: as it is, with initial
factors (the difference, at twice the rank), and that cut back to the rank. Seconds and peak memory are those of the
recovery alone. The full model is a file of the output matrix's shape without content: recovery reads its shapes only.
"""

from __future__ import annotations

import argparse
import json
import struct
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.adapters.adapter_file import write_adapter
from compress.adapters.initial_factors import PREFIX
from compress.adapters.recover import recover_adapter
from compress.benchmarks.model_shapes import CONFIGS, architecture
from compress.benchmarks.protocol import host, versions, write_json
from compress.evaluate.memory import PeakMemory, file_bytes
from compress.model.architecture import Architecture
from compress.model.checkpoint import Checkpoint
from compress.prune.counts import published_kept
from compress.structure import LayerStructure, StructureMap, full_layer, structure_map

TAKES = ("minutes", "seconds")
NEEDS = ()

MODEL, RATIO = "LLaMA-2-70B", 0.85
WAYS = ("plain", "difference", "difference, cut")


def structure_of(arch: Architecture, *, seed: int = 0) -> StructureMap:
    """LoRAM's structure at `RATIO`, its indices at random."""
    generator = torch.Generator().manual_seed(seed)
    counts = published_kept(arch, RATIO)

    def kept(size: int, count: int) -> Tensor:
        return torch.randperm(size, generator=generator)[:count].sort().values.int()

    whole = full_layer(arch)
    layers = [
        LayerStructure(kv_groups=kept(arch.kv_heads, counts[0]), channels=kept(arch.channels, counts[1]))
        if 4 <= index < arch.layers - 2
        else whole
        for index in range(arch.layers)
    ]
    return structure_map(arch, layers, base_fingerprint="")


def write_small_adapter(
    arch: Architecture,
    structure: StructureMap,
    rank: int,
    folder: Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """A random adapter for the model that ``structure`` leaves, with and without initial factors."""
    generator = torch.Generator().manual_seed(1)
    small = replace(arch, layer_shapes=structure.shapes)
    shapes = {
        small.module_name(layer, spec): small.at(layer).linear_shape(spec)
        for layer in range(arch.layers)
        for spec in small.linears_at(layer)
    }
    shapes["lm_head"] = (arch.vocab, arch.hidden)

    def factors() -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for module, (out, into) in shapes.items():
            for side, shape in (("A", (rank, into)), ("B", (out, rank))):
                values = torch.randn(shape, generator=generator)
                found[f"{PREFIX}{module}.lora_{side}.weight"] = values.to(dtype)
        return found

    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "init_lora_weights": True}
    tensors = factors()
    write_adapter(folder / "plain", config, tensors)
    write_adapter(folder / "difference", config, tensors, factors())


def write_hollow_model(arch: Architecture, folder: Path) -> None:
    """A checkpoint whose header names the output matrix and whose content is a hole."""
    size = 2 * arch.vocab * arch.hidden
    entry = {"dtype": "BF16", "shape": [arch.vocab, arch.hidden], "data_offsets": [0, size]}
    header = json.dumps({arch.lm_head: entry}).encode()
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIGS[MODEL]), encoding="utf-8")
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + size)


def measure(folder: Path, way: str, rank: int) -> dict[str, Any]:
    """One recovery in this process, as JSON values."""
    torch.set_num_threads(1)  # small factors: a second thread only waits
    arch = architecture(MODEL)
    structure = StructureMap.load(folder / "structure.safetensors")
    full, out = Checkpoint(folder / "full"), folder / f"out {way}"
    started = time.monotonic()
    with PeakMemory("cpu") as peak:
        report = recover_adapter(
            folder / way.partition(",")[0],
            structure,
            arch,
            full,
            out,
            full_name=MODEL,
            compress_rank=rank if "cut" in way else None,
        )
    return {
        "seconds": round(time.monotonic() - started, 2),
        "peak_bytes": peak.host_bytes,
        "small_bytes": file_bytes(folder / way.partition(",")[0]),
        "full_bytes": file_bytes(out),
        "modules": report.modules,
        "scattered": report.scattered,
        "rank": report.max_rank,
        "truncation": report.truncation_overall,
    }


def run_all(folder: Path, rank: int, dtype: torch.dtype) -> dict[str, dict[str, Any]]:
    """Make the inputs, then recover in every way."""
    arch = architecture(MODEL)
    structure = structure_of(arch)
    structure.save(folder / "structure.safetensors")
    write_small_adapter(arch, structure, rank, folder, dtype=dtype)
    write_hollow_model(arch, folder / "full")
    rows = {}
    for way in WAYS:
        command = [sys.executable, "-m", "compress.benchmarks.loram_recover", "--one", way]
        done = subprocess.run(
            [*command, "--work", str(folder), "--rank", str(rank)], capture_output=True, text=True, check=True
        )
        rows[way] = json.loads(done.stdout.strip().splitlines()[-1])
    return rows


def table(rows: dict[str, dict[str, Any]]) -> str:
    """The rows as text."""
    lines = [f"{'recovery':18}{'seconds':>9}{'peak GiB':>10}{'rank':>6}{'small MB':>10}{'full MB':>9}"]
    lines += [
        f"{way:18}{row['seconds']:9.2f}{row['peak_bytes'] / 2**30:10.2f}{row['rank']:6d}"
        f"{row['small_bytes'] / 1e6:10.1f}{row['full_bytes'] / 1e6:9.1f}"
        for way, row in rows.items()
    ]
    return "\n".join(lines)


def main() -> int:
    """Command line; the table is printed last."""
    parser = argparse.ArgumentParser(
        prog="python -m compress.benchmarks.loram_recover", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--quick", action="store_true", help="rank 1")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the factors")
    parser.add_argument("--work", type=Path, help="where the adapters go (default: a temporary folder)")
    parser.add_argument("--one", choices=WAYS, help="only this way, on what lies in --work")
    parser.add_argument("--out", type=Path, help="write the rows as JSON to this file")
    arguments = parser.parse_args()
    rank = 1 if arguments.quick else arguments.rank
    if arguments.one is not None:
        print(json.dumps(measure(arguments.work, arguments.one, rank)))
        return 0
    with tempfile.TemporaryDirectory(dir=arguments.work) as folder:
        rows = run_all(Path(folder), rank, getattr(torch, arguments.dtype))
    if arguments.out is not None:
        identity = {"benchmark": "loram_recover", "model": MODEL, "ratio": RATIO, "rank": rank}
        identity |= {"dtype": arguments.dtype}
        content = {"identity": identity, "versions": versions(), "host": host(), "rows": rows}
        write_json(arguments.out, {"format_version": 1, **content})
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
