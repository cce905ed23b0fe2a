"""Train small, infer large: held-out loss of full LoRA, LoRAM and QLoRAM, with and without alignment and recovery.

``python -m compress.benchmarks.loram [--quick] [--part table|masks] [--ratio 0.5] [--align-steps 400]
[--train-steps 200] [--seeds 0] [--only NAMES]``

Protocol. Model SmolLM2-135M-Instruct (dequantized baseline), float32 on every machine. All adapters see the same
windows of the same rows of Dolly (training split; loss on the responses), with the same steps, rank 8, alpha 16, on
every decoder linear. The small models lose ``--ratio`` of the decoder linear weights; the first four and last two
layers stay whole. "rand" prunes at random, "stru" by gradients (taylor), without any repair; "aligned" goes on
pre-training the small model's weights on WikiText-2 train, output matrix frozen. "nf4" stores the small model in as
many bits as NF4 takes, "2.75" in 2.75. Each small model is made once and given away; its user trains and recovers in
a workspace of their own. A row has three losses on held-out rows of Dolly (test split, responses only): of the small
base, of the small model with its adapter (inference without recovery), and of the full model with the recovered
adapter. "kept" is the share of full LoRA's improvement over the untuned model that the recovered adapter keeps,
"speed" the training throughput over full LoRA's, in windows a second. Speed and peak memory are those that the stage
``train`` recorded, in a process of its own: its peak is that of training, or of opening the result in float32 after it.

The part masks has LoRAM-semi (4:8 and 2:4) and -unst (scores of Wanda). The recovered adapter is the product as it is;
"masked" is the full model with the product times the mask, which no adapter file can hold.

Rows are on disk as soon as they are known: run it again to go on. In ``--work`` stay small models, and every row beside
what it depends on: another ratio, number of alignment steps or part measures only the rows that they change.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from compress.benchmarks.loram_rows import DTYPE, Bench, full_row, shared_row, small_row
from compress.benchmarks.protocol import Rows
from compress.errors import UsageError
from compress.model.load import resolve
from compress.pipelines.model_input import device_and_dtype
from compress.pipelines.settings import Common

TAKES = ("hours", "minutes")
NEEDS = ("wikitext2",)

PARTS: dict[str, tuple[str, ...]] = {
    "table": (
        "rand",
        "stru",
        "rand, aligned",
        "stru, aligned",
        "stru, nf4",
        "stru, 2.75",
        "stru, aligned, nf4",
        "stru, aligned, 2.75",
    ),
    "masks": tuple(f"{name}{end}" for name in ("semi 4:8", "semi 2:4", "unst") for end in ("", ", aligned")),
}
TRAINING: dict[str, Any] = {"lr": 3e-4, "rank": 8, "alpha": 16, "dropout": 0.05}


def table(rows: Rows, names: tuple[str, ...], seeds: list[int]) -> str:
    """The rows as text."""
    if not rows.has("untuned"):
        return "nothing measured yet"
    start = rows.get("untuned")["recovered"]
    lines = [
        f"{'method':26}{'seed':>5}{'base':>9}{'small':>9}{'recovered':>11}{'masked':>9}{'kept':>7}{'speed':>7}{'MB':>8}",
        f"{'untuned':26}{'':>5}{'':>9}{'':>9}{start:11.4f}",
    ]
    for seed in seeds:
        full = rows.get(f"full {seed}") if rows.has(f"full {seed}") else None
        for name in ("full", *names):
            if not rows.has(f"{name} {seed}"):
                continue
            row = rows.get(f"{name} {seed}")
            cells = [
                f"{row[key]:.4f}" if key in row else "" for key in ("base", "small", "recovered", "masked")
            ]
            kept = speed = ""
            if full is not None and full["recovered"] < start:
                kept = f"{(start - row['recovered']) / (start - full['recovered']):.0%}"
            if full is not None:
                speed = f"{row['windows_per_second'] / full['windows_per_second']:.2f}x"
            size = f"{row['bytes'] / 1e6:.1f}" if "bytes" in row else ""
            lines.append(
                f"{name:26}{seed:5d}{cells[0]:>9}{cells[1]:>9}{cells[2]:>11}{cells[3]:>9}{kept:>7}{speed:>7}{size:>8}"
            )
    return "\n".join(lines)


def default_data() -> str:
    """Dolly in the data folder.

    Raises:
        UsageError: It is not there.
    """
    file = Path(os.environ.get("COMPRESS_DATA", "")) / "dolly" / "dolly_3k.jsonl"
    if not file.is_file():
        raise UsageError("There is no dolly/dolly_3k.jsonl in COMPRESS_DATA.", "Give a file with --data.")
    return str(file)


def bench_of(arguments: argparse.Namespace) -> Bench:
    """Sizes of the benchmark: of the table, or of a functional check."""
    full = resolve(arguments.model)
    loop = {"micro_batch": 4, "accumulation": 1, "sequence": 256}
    bench = Bench(
        full=full,
        work=arguments.work,
        data=arguments.data or default_data(),
        corpus=arguments.corpus,
        ratio=arguments.ratio,
        calibration={"calibration_tokens": 16_384},
        align={**loop, "accumulation": 2, "steps": arguments.align_steps, "lr": 2e-4},
        train={
            **loop,
            "accumulation": 2,
            "steps": arguments.train_steps,
            "lr": 3e-4,
            "rank": 8,
            "alpha": 16,
            "dropout": 0.05,
        },
        windows=128,
        length=256,
        device=device_and_dtype(Common(dtype=DTYPE))[0],
    )
    if not arguments.quick:
        return bench
    few = {"steps": 2, "micro_batch": 2, "accumulation": 1, "sequence": 64}
    return replace(
        bench,
        calibration={"calibration_tokens": 512},
        align={**bench.align, **few},
        train={**bench.train, **few},
        windows=4,
        length=64,
    )


def main() -> int:
    """Command line; the table is printed last."""
    parser = argparse.ArgumentParser(
        prog="python -m compress.benchmarks.loram", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--quick", action="store_true", help="few tokens, to see that it runs")
    parser.add_argument("--part", choices=tuple(PARTS), default="table")
    parser.add_argument("--model", help="default: the embedded model")
    parser.add_argument("--data", help="instructions, .jsonl (default: Dolly in COMPRESS_DATA)")
    parser.add_argument("--corpus", default="wikitext2", help="text of alignment and calibration")
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--align-steps", type=int, default=400, help="2048 tokens each")
    parser.add_argument("--train-steps", type=int, default=200, help="of adapter training, 2048 tokens each")
    parser.add_argument("--seeds", default="0", help="of adapter training, separated by commas")
    parser.add_argument("--only", help="methods, separated by ;")
    parser.add_argument("--work", type=Path, default=Path("loram-work"), help="where small models are kept")
    parser.add_argument("--out", type=Path, help="JSON file (default: loram-PART.json)")
    arguments = parser.parse_args()
    bench = bench_of(arguments)
    names = PARTS[arguments.part]
    if arguments.only:
        names = tuple(name.strip() for name in arguments.only.split(";"))
        unknown = [name for name in names if name not in PARTS[arguments.part]]
        if unknown:
            raise UsageError(
                f"The part {arguments.part} has no {unknown[0]!r}.",
                f"Choose among {'; '.join(PARTS[arguments.part])}.",
            )
    seeds = [int(part) for part in arguments.seeds.split(",")]
    identity = bench.identity() | {
        "part": arguments.part,
        "corpus": Path(bench.corpus).name,
        "ratio": bench.ratio,
        "calibration": dict(bench.calibration),
        "align": dict(bench.align),
        "train": dict(bench.train),
    }
    rows = Rows(arguments.out or Path(f"loram-{arguments.part}.json"), identity)
    bench.work.mkdir(parents=True, exist_ok=True)

    def measured(name: str, seed: int | None, measure: Callable[[], dict[str, Any]]) -> None:
        key = name if seed is None else f"{name} {seed}"
        if not rows.has(key):
            rows.put(key, shared_row(bench, name, key, measure))

    measured("untuned", None, lambda: {"recovered": bench.loss(bench.full)})
    for seed in seeds:
        measured("full", seed, partial(full_row, bench, seed))
        for name in names:
            measured(name, seed, partial(small_row, bench, name, seed))
    print(table(rows, names, seeds))
    return 0


if __name__ == "__main__":
    sys.exit(main())
