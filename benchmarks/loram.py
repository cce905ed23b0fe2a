"""Train small, infer large: held-out loss of full LoRA, LoRAM and QLoRAM, with and without alignment and recovery.

``python -m compress.benchmarks.loram [--quick] [--part table|masks] [--ratio 0.5] [--seeds 0] [--only NAMES]``

Protocol. Model SmolLM2-135M-Instruct (dequantized baseline), float32 on every machine. All adapters see the same
windows of the same rows of Dolly (training split; loss on the responses), with the same steps, rank 8, alpha 16, on
every decoder linear. The small models lose ``--ratio`` of the decoder linear weights; the first four and last two
layers stay whole. "rand" prunes at random, "stru" by gradients (taylor), without any repair; "aligned" goes on
pre-training the small model's weights on WikiText-2 train, output matrix frozen. "nf4" stores the small model in as
many bits as NF4 takes, "2.75" in 2.75. Each small model is made once and given away; its user trains and recovers in
a workspace of their own. A row has three losses on held-out rows of Dolly (test split, responses only): of the small
base, of the small model with its adapter (inference without recovery), and of the full model with the recovered
adapter. "kept" is the share of full LoRA's improvement over the untuned model that the recovered adapter keeps,
"speed" the training throughput over full LoRA's. Both, and the peak memory, are those that the stage recorded.

The part masks has LoRAM-semi (4:8 and 2:4) and -unst (scores of Wanda). The recovered adapter is the product as it is;
"masked" is the full model with the product times the mask, which no adapter file can hold.

Rows are on disk as soon as they are known: run it again to go on. Small models stay in ``--work``.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from compress.adapters.attach import load_adapter
from compress.adapters.masked import mask_adapters
from compress.benchmarks.protocol import Rows
from compress.data.sources import load_text
from compress.data.windows import Windows, token_windows
from compress.errors import UsageError
from compress.evaluate.perplexity import mean_loss
from compress.model.checkpoint import Checkpoint
from compress.model.load import load_model, load_tokenizer, resolve
from compress.pipelines.dispatch import run_verb
from compress.pipelines.settings import Common
from compress.prune.weight_masks import load_masks

TAKES = ("hours", "minutes")
NEEDS = ("wikitext2",)

DTYPE = "float32"
CUT: dict[str, Any] = {
    "shape": "local",
    "ratio_of": "model",
    "skip_first": 4,
    "skip_last": 2,
    "repair": "none",
    "repair_steps": 0,
}
PRUNINGS: dict[str, dict[str, Any]] = {
    "rand": {"criterion": "random", **CUT},
    "stru": {"criterion": "taylor", **CUT},
    "semi 4:8": {"criterion": "wanda", "shape": "semi", "pattern": "4:8", "skip_first": 4, "skip_last": 2},
    "semi 2:4": {"criterion": "wanda", "shape": "semi", "pattern": "2:4", "skip_first": 4, "skip_last": 2},
    "unst": {"criterion": "wanda", "shape": "unstructured", "skip_first": 4, "skip_last": 2},
}
QUANTIZED = {
    "nf4": {"budget": "4.127bit", "rank": "0", "objective": "frobenius"},
    "2.75": {"budget": "2.75bit"},
}
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """What the rows of one file share.

    Attributes:
        full: Folder of the full model.
        work: Where small models and workspaces are.
        data: Instructions to train on and to score.
        corpus: Text of alignment.
        ratio: Of the decoder linear weights.
        calibration: Settings of scoring.
        align: Settings of alignment.
        train: Settings of adapter training.
        windows: Windows that are scored.
        length: Their tokens.
    """

    full: Path
    work: Path
    data: str
    corpus: str
    ratio: float
    calibration: Mapping[str, Any]
    align: Mapping[str, Any]
    train: Mapping[str, Any]
    windows: int
    length: int

    def common(self, run: Path, model: Path, data: str, seed: int = 0) -> Common:
        """Options of one chain."""
        return Common(run=run, model=str(model), data=data, seed=seed, dtype=DTYPE, effort="quick")

    def held_out(self) -> Windows:
        """Rows that nothing else reads."""
        text = load_text(self.data, "test")
        return token_windows(text, load_tokenizer(self.full), length=self.length, count=self.windows)

    def loss(self, model: Path, adapter: Path | None = None) -> float:
        """Mean loss on the held-out rows, nats per response token."""
        network = load_model(model, dtype=torch.float32)
        if adapter is not None:
            network = load_adapter(network, adapter)
        return mean_loss(network, self.held_out(), batch_size=4)


def small_model(bench: Bench, name: str) -> Path:
    """The folder of a small model, made on the first call; prunings and alignments are shared by later steps."""
    kind, *steps = name.split(", ")
    run = bench.work / _file_name(kind)
    common = bench.common(run, bench.full, bench.corpus)
    given = {**PRUNINGS[kind], **bench.calibration}
    if given["shape"] != "semi":
        given["ratio"] = bench.ratio
    folder = Path(run_verb("prune", common, given, quiet=True)["path"])
    if "aligned" in steps:
        folder = Path(run_verb("align", common, dict(bench.align), quiet=True)["path"])
    for step in steps:
        if step in QUANTIZED:
            run = bench.work / "-".join([folder.parent.name, folder.name, step])
            settings = {**bench.calibration, **QUANTIZED[step]}
            chain = bench.common(run, folder, bench.corpus)
            folder = Path(run_verb("quantize", chain, settings, quiet=True)["path"])
    return folder


def _file_name(name: str) -> str:
    return name.replace(",", "").replace(":", "-").replace(" ", "-")


def train(bench: Bench, model: Path, run: Path, seed: int) -> tuple[Path, dict[str, Any]]:
    """An adapter on ``model`` in a fresh workspace; its folder, and what training took."""
    record = run_verb("train", bench.common(run, model, bench.data, seed), dict(bench.train), quiet=True)
    metrics = record["metrics"]
    return Path(record["path"]), {
        "tokens": metrics["tokens"],
        "windows_per_second": metrics["steps"] * bench.train["micro_batch"] / metrics["train_seconds"],
        "peak_memory_bytes": record["peak_memory_bytes"],
        "trainable_parameters": metrics["trainable_parameters"],
    }


def full_row(bench: Bench, seed: int) -> dict[str, Any]:
    """LoRA on the full model."""
    run = bench.work / f"user-full-{seed}"
    adapter, facts = train(bench, bench.full, run, seed)
    row = {"recovered": bench.loss(bench.full, adapter), **facts}
    shutil.rmtree(run)
    return row


def small_row(bench: Bench, name: str, seed: int) -> dict[str, Any]:
    """LoRAM on one small model."""
    small, run = small_model(bench, name), bench.work / f"user-{_file_name(name)}-{seed}"
    checkpoint = Checkpoint(small)
    adapter, facts = train(bench, small, run, seed)
    common = bench.common(run, small, bench.data, seed)
    recovered = run_verb("recover", common, {"onto": str(bench.full)}, quiet=True)["path"]
    row = {
        "base": bench.loss(small),
        "small": bench.loss(small, adapter),
        "recovered": bench.loss(bench.full, Path(recovered)),
        "bytes": checkpoint.bytes,
        **facts,
    }
    masks = load_masks(adapter)
    if masks is not None:
        network = load_adapter(load_model(bench.full, dtype=torch.float32), Path(recovered))
        mask_adapters(network, masks)
        row["masked"] = mean_loss(network, bench.held_out(), batch_size=4)
    shutil.rmtree(run)
    return row


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
        train={**loop, "accumulation": 2, "steps": 200, "lr": 3e-4, "rank": 8, "alpha": 16, "dropout": 0.05},
        windows=128,
        length=256,
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
    identity = {
        "benchmark": "loram",
        "part": arguments.part,
        "model": Checkpoint(bench.full).fingerprint(),
        "data": Path(bench.data).name,
        "corpus": Path(bench.corpus).name,
        "dtype": DTYPE,
        "ratio": bench.ratio,
        "calibration": dict(bench.calibration),
        "align": dict(bench.align),
        "train": dict(bench.train),
        "windows": bench.windows,
        "length": bench.length,
    }
    rows = Rows(arguments.out or Path(f"loram-{arguments.part}.json"), identity)
    bench.work.mkdir(parents=True, exist_ok=True)
    if not rows.has("untuned"):
        rows.put("untuned", {"recovered": bench.loss(bench.full)})
    for seed in seeds:
        if not rows.has(f"full {seed}"):
            rows.put(f"full {seed}", full_row(bench, seed))
        for name in names:
            if not rows.has(f"{name} {seed}"):
                rows.put(f"{name} {seed}", small_row(bench, name, seed))
    print(table(rows, names, seeds))
    return 0


if __name__ == "__main__":
    sys.exit(main())
