"""Seconds of quantizing a whole model, with those of every part, against GPTQModel on the same calibration tokens.

``python -m compress.benchmarks.quantize_speed [--quick] [--repeats N] [--peers DIR] [--out FILE]``

One run after the other, each alone in its process' turn: ours for the objective hessian (bits and ranks allocated
jointly, 2.75 bits), ours for the objective frobenius, and GPTQModel (4 bits, groups of 64) in the environment that
``make peers`` made. All read the same 64 windows of 512 tokens of WikiText-2 train, but for frobenius, which reads
none.

Seconds are those of quantization alone, for everybody: no model loaded, nothing imported, compiled or written. Ours are
the sum of the parts; ``the whole verb`` adds loading, writing, two perplexities and the check in a fresh process. A
run on a machine that does other things compares nothing: the load average stands beside it. Runs are repeated in
turns; the figures are medians.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from compress.benchmarks.peers.environment import ENVIRONMENTS
from compress.benchmarks.protocol import LENGTH, Rows
from compress.benchmarks.quantization import CALIBRATION, SOURCE, TRAINING
from compress.benchmarks.quantization_rows import Bench, Recipe, row_of
from compress.kernels.library import status
from compress.model.checkpoint import Checkpoint
from compress.model.load import resolve
from compress.pipelines.dispatch import quiet_libraries
from compress.pipelines.model_input import device_and_dtype
from compress.pipelines.settings import Common

TAKES = ("hours", "minutes")
NEEDS = ("wikitext2", "peer:gptqmodel")

PEER = "gptqmodel"
RUNS = {
    "hessian": Recipe(quantize={"budget": "2.75bit"}),
    "frobenius": Recipe(quantize={"budget": "2.75bit", "objective": "frobenius"}),
    PEER: Recipe(peer=PEER, quantize={"bits": 4}),
}
GOALS = {"hessian": 3.0, "frobenius": 15.0}
"""How many times faster than the peer."""


def measure(bench: Bench, rows: Rows, repeats: int) -> None:
    """Make the runs that are not there, in turns, each in a folder of its own: nothing finished is found again."""
    for turn in range(repeats):
        for name, recipe in RUNS.items():
            key = f"{name}, {turn}"
            if rows.has(key) and "not_run" not in rows.get(key):
                continue
            with tempfile.TemporaryDirectory(dir=bench.work) as folder:
                rows.put(key, row_of(replace(bench, work=Path(folder)), recipe))


def medians(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """By run: the median seconds, those of every part and of the whole verb, and the turns they come from."""
    found: dict[str, dict[str, Any]] = {}
    for name in RUNS:
        turns = [row for key, row in rows.items() if key.startswith(f"{name}, ") and "not_run" not in row]
        if not turns:
            continue
        parts = [row.get("seconds_by_part", {}) for row in turns]
        whole = [row["seconds_of_the_verb"] for row in turns if "seconds_of_the_verb" in row]
        found[name] = {
            "seconds": statistics.median(row["seconds"] for row in turns),
            "parts": {part: statistics.median(own[part] for own in parts) for part in parts[0]},
            "verb": statistics.median(whole) if whole else None,
            "turns": len(turns),
            "load": max(row["load_before"] for row in turns),
        }
    return found


def report(found: Mapping[str, Mapping[str, Any]]) -> str:
    """The figures as lines of text, ratios and goals last."""
    lines = []
    for name, run in found.items():
        verb = "" if run["verb"] is None else f" ({run['verb']:.1f} s the whole verb)"
        lines.append(
            f"{name}: {run['seconds']:.1f} s{verb}, {run['turns']} turns, load up to {run['load']:.1f}"
        )
        lines += [f"  {part}: {seconds:.1f} s" for part, seconds in run["parts"].items()]
    for name, goal in GOALS.items():
        if name not in found or PEER not in found:
            lines.append(f"not measured: {name} against {PEER}, goal {goal:.0f}x")
            continue
        ratio = found[PEER]["seconds"] / found[name]["seconds"]
        lines.append(f"{name}: {ratio:.2f}x as fast as {PEER}, goal {goal:.0f}x")
    return "\n".join(lines)


def main() -> int:
    """Command line; the ratios are printed last."""
    parser = argparse.ArgumentParser(
        prog="python -m compress.benchmarks.quantize_speed", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--quick", action="store_true", help="four windows, to see that it runs")
    parser.add_argument("--model", help="default: the embedded model")
    parser.add_argument("--repeats", type=int, default=1, help="turns (default: 1)")
    parser.add_argument(
        "--peers", type=Path, default=ENVIRONMENTS, help="where `make peers` put environments"
    )
    parser.add_argument("--out", type=Path, help="JSON file; one that is there is gone on with")
    arguments = parser.parse_args()
    quiet_libraries()
    model, tokens = resolve(arguments.model), 4 * LENGTH if arguments.quick else CALIBRATION
    device, dtype = device_and_dtype(Common())
    identity = {
        "benchmark": "quantize_speed",
        "model": Checkpoint(model).fingerprint(),
        "source": SOURCE,
        "calibration_tokens": tokens,
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "kernels": status().level,
        "goals": GOALS,
    }
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(
            model=model,
            work=Path(folder),
            peers=arguments.peers,
            source=SOURCE,
            device=device,
            dtype=dtype,
            calibration_tokens=tokens,
            training=TRAINING,
            test_tokens=LENGTH,
        )
        rows = Rows(arguments.out or Path(folder) / "quantize-speed.json", identity)
        measure(bench, rows, arguments.repeats)
        print(report(medians(rows.rows)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
