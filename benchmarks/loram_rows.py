"""The rows of the benchmark of LoRAM: what each depends on, and how it is measured."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from compress.adapters.attach import load_adapter
from compress.adapters.masked import mask_adapters
from compress.benchmarks.protocol import Rows
from compress.benchmarks.stages import Runner, in_fresh_process
from compress.data.sources import load_text
from compress.data.windows import Windows, token_windows
from compress.evaluate.perplexity import mean_loss
from compress.model.checkpoint import Checkpoint
from compress.model.load import load_model, load_tokenizer
from compress.pipelines.dispatch import run_verb
from compress.pipelines.identity import digest
from compress.pipelines.settings import Common
from compress.prune.weight_masks import load_masks

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
        device: Where losses are computed.
        runner: Runs adapter training.
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
    device: str = "cpu"
    runner: Runner = in_fresh_process

    def identity(self) -> dict[str, Any]:
        """What every row depends on."""
        return {
            "benchmark": "loram",
            "version": 2,  # windows per second count accumulation; training has a process of its own
            "model": Checkpoint(self.full).fingerprint(),
            "data": Path(self.data).name,
            "dtype": DTYPE,
            "windows": self.windows,
            "length": self.length,
        }

    def small_identity(self, kind: str) -> dict[str, Any]:
        """What a pruned model depends on."""
        given = {**PRUNINGS[kind], **self.calibration}
        if given["shape"] != "semi":
            given["ratio"] = self.ratio
        return {"prune": given, "corpus": Path(self.corpus).name}

    def row_identity(self, name: str) -> dict[str, Any]:
        """What the row of a method depends on, but the seed."""
        found = self.identity()
        if name == "untuned":
            return found
        found["train"] = dict(self.train)
        if name == "full":
            return found
        kind, *steps = name.split(", ")
        found |= self.small_identity(kind)
        found |= {step: {**self.calibration, **QUANTIZED[step]} for step in steps if step in QUANTIZED}
        return found | ({"align": dict(self.align)} if "aligned" in steps else {})

    def common(self, run: Path, model: Path, data: str, seed: int = 0) -> Common:
        """Options of one chain."""
        return Common(run=run, model=str(model), data=data, seed=seed, dtype=DTYPE, effort="quick")

    def held_out(self) -> Windows:
        """Rows that nothing else reads."""
        text = load_text(self.data, "test")
        return token_windows(text, load_tokenizer(self.full), length=self.length, count=self.windows)

    def loss(self, model: Path, adapter: Path | None = None) -> float:
        """Mean loss on the held-out rows, nats per response token."""
        network = load_model(model, dtype=torch.float32, device=self.device)
        if adapter is not None:
            network = load_adapter(network, adapter)
        return mean_loss(network, self.held_out(), batch_size=4)


def small_model(bench: Bench, name: str) -> Path:
    """The folder of a small model, made on the first call; prunings and alignments are shared by later steps."""
    kind, *steps = name.split(", ")
    made_of = bench.small_identity(kind) | {"align": dict(bench.align)}
    run = bench.work / f"{_file_name(kind)}-{digest(made_of)[:8]}"
    common = bench.common(run, bench.full, bench.corpus)
    folder = Path(run_verb("prune", common, made_of["prune"], quiet=True)["path"])
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


def user_folder(bench: Bench, name: str, seed: int) -> Path:
    """The workspace of who trains; another one for every setting, so that what was interrupted is in nobody's way."""
    return bench.work / f"user-{_file_name(name)}-{digest(bench.row_identity(name))[:8]}-{seed}"


def train(bench: Bench, model: Path, run: Path, seed: int) -> tuple[Path, dict[str, Any]]:
    """An adapter on ``model`` in a fresh workspace; its folder, and what training took."""
    record = bench.runner("train", bench.common(run, model, bench.data, seed), bench.train)
    metrics = record["metrics"]
    windows = metrics["steps"] * bench.train["micro_batch"] * bench.train["accumulation"]
    return Path(record["path"]), {
        "tokens": metrics["tokens"],
        "windows_per_second": windows / metrics["train_seconds"],
        "peak_memory_bytes": record["peak_memory_bytes"],
        "trainable_parameters": metrics["trainable_parameters"],
    }


def full_row(bench: Bench, seed: int) -> dict[str, Any]:
    """LoRA on the full model."""
    run = user_folder(bench, "full", seed)
    adapter, facts = train(bench, bench.full, run, seed)
    row = {"recovered": bench.loss(bench.full, adapter), **facts}
    shutil.rmtree(run)
    return row


def small_row(bench: Bench, name: str, seed: int) -> dict[str, Any]:
    """LoRAM on one small model."""
    small, run = small_model(bench, name), user_folder(bench, name, seed)
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
        full = load_model(bench.full, dtype=torch.float32, device=bench.device)
        network = load_adapter(full, Path(recovered))
        mask_adapters(network, masks)
        row["masked"] = mean_loss(network, bench.held_out(), batch_size=4)
    shutil.rmtree(run)
    return row


def shared_row(bench: Bench, name: str, key: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A row that was measured before with all that it depends on, or that is measured now."""
    identity = bench.row_identity(name)
    known = Rows(bench.work / "rows" / f"{digest(identity)[:16]}.json", identity)
    if not known.has(key):
        known.put(key, measure())
    return known.get(key)
