"""The rows of the quantization benchmark: what each one is, and how it is made and measured."""

from __future__ import annotations

import math
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from compress.benchmarks.peers.autoround import quantize_with_autoround
from compress.benchmarks.peers.bitsandbytes import quantize_with_bitsandbytes
from compress.benchmarks.peers.environment import PeerResult
from compress.benchmarks.peers.environment_storage import linear_shapes, stored_bytes
from compress.benchmarks.peers.gptqmodel import quantize_with_gptqmodel
from compress.benchmarks.peers.hqq import quantize_with_hqq
from compress.benchmarks.protocol import LENGTH, TOKENS, score, test_windows
from compress.benchmarks.quantization_models import quantize_uniformly
from compress.export.packed import write_packed
from compress.model.checkpoint import Checkpoint
from compress.model.load import load_model, load_tokenizer
from compress.pipelines.identity import digest
from compress.pipelines.measure import calibration_windows
from compress.pipelines.quantize import quantize
from compress.pipelines.reporter import Reporter
from compress.pipelines.settings import Common, QuantizeSettings, TrainSettings
from compress.pipelines.settings import resolve as resolve_settings
from compress.pipelines.stage import Context, Outcome, settings_dict
from compress.pipelines.train import train
from compress.pipelines.workspace import Workspace, read_json, write_json
from compress.progress import Progress
from compress.quantize.config import QuantConfig

PARTS = ("sensitivities", "error tables", "exact errors", "decompose")
"""What ``quantize`` times; the solver's seconds come from its certificate."""

PAPER = {"objective": "frobenius", "menu": "paper", "iterations": 100}
"""LQ-LoRA's own algorithm (arXiv 2311.12023 §3): no data, its whole menu, one rank for all."""

WITH_DATA = {**PAPER, "objective": "fisher"}
"""The same with its data-aware objective, on the calibration tokens of every row here (the paper reads more)."""

PEERS: dict[str, Callable[..., PeerResult]] = {
    "gptqmodel": quantize_with_gptqmodel,
    "bitsandbytes": quantize_with_bitsandbytes,
    "hqq": quantize_with_hqq,
    "autoround": quantize_with_autoround,
}
CALIBRATED = ("gptqmodel", "autoround")


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How one row is made; the dense model when nothing is said.

    Attributes:
        quantize: Settings of ``quantize``.
        uniform: One configuration for all matrices, without factors; ``quantize`` has objective, menu and budget.
        config: That configuration; None: of the menu's that fit in the budget, the one with the least summed cost.
        train: Method of ``train``; None: untrained.
        peer: Name in ``PEERS``; ``quantize`` then holds its own settings.
    """

    quantize: Mapping[str, Any] = field(default_factory=dict)
    uniform: bool = False
    config: QuantConfig | None = None
    train: str | None = None
    peer: str | None = None


def _files() -> list[tuple[str, int, str]]:
    """Rows at the size of a whole file: name, size in MB, what becomes of the embeddings."""
    sizes = {95: ("keep", "8bit", "menu"), 70: ("8bit", "menu"), 50: ("menu",)}
    return [
        (f"ours {size} MB, embeddings {mode}", size, mode) for size, modes in sizes.items() for mode in modes
    ]


FILES = tuple(name for name, _, _ in _files())


def _recipes() -> dict[str, Recipe]:
    def lq(bits: float, **given: Any) -> Recipe:
        return Recipe(quantize={"budget": f"{bits}bit", **given})

    def trained(bits: float, **given: Any) -> Recipe:
        return Recipe(quantize={"budget": f"{bits}bit", **given}, train="lq")

    free, fisher = {"objective": "frobenius"}, {"objective": "fisher"}
    found = {"dense": Recipe()}
    found |= {f"ours {bits}": lq(bits) for bits in (4.25, 3.25, 2.75, 2.25)}
    for bits in (4.25, 3.25, 2.75):
        found[f"lq-lora {bits}, rank 8"] = lq(bits, rank="8", **PAPER)
        found[f"lq-lora with data {bits}, rank 8"] = lq(bits, rank="8", **WITH_DATA)
        found[f"lq-lora {bits} + rank 64"] = lq(bits, rank="64", budget_includes="none", **PAPER)
    for bits in (3.25, 2.75):
        found[f"ours, no data {bits}"] = lq(bits, **free)
        found[f"ours, fisher {bits}"] = lq(bits, **fisher)
        for name, given in (("hessian", {}), ("fisher", fisher), ("frobenius", free)):
            found[f"{name}, uniform {bits}"] = Recipe(
                quantize={"budget": f"{bits}bit", "rank": "0", **given}, uniform=True
            )
            found[f"{name}, no ranks {bits}"] = lq(bits, rank="0", **given)
    found["ours 2.75, rank 8"] = lq(2.75, rank="8")
    for bits in (4, 3, 2):
        found[f"gptqmodel {bits}"] = Recipe(peer="gptqmodel", quantize={"bits": bits})
    for bits in (4, 3):
        found[f"gptqmodel {bits}, zero points"] = Recipe(
            peer="gptqmodel", quantize={"bits": bits, "symmetric": False}
        )
    found["bitsandbytes nf4"] = Recipe(peer="bitsandbytes")
    for bits in (4, 3, 2):
        found[f"hqq {bits}"] = Recipe(peer="hqq", quantize={"bits": bits})
    for bits in (4, 3):
        found[f"autoround {bits}, 20 steps a layer"] = Recipe(
            peer="autoround", quantize={"bits": bits, "iterations": 20}
        )
    found["ours 2.75, trained"] = trained(2.75)
    found["ours 2.75, rank 8, trained"] = trained(2.75, rank="8")
    found["lq-lora 2.75, rank 8, trained"] = trained(2.75, rank="8", **PAPER)
    found["nf4 + lora, trained"] = Recipe(
        quantize={"budget": "4.25bit", "rank": "0", **free},
        uniform=True,
        config=QuantConfig(bits=4),
        train="lora",
    )
    for name, megabytes, embeddings in _files():
        found[name] = Recipe(quantize={"budget": f"{megabytes}MB", "embeddings": embeddings})
    return found


RECIPES = _recipes()
"""Every row by name. Bits are the budget; ``+ rank 64``: the paper's count, which leaves the factors out."""


class Stopwatch(Reporter):
    """A reporter that keeps the seconds of every bar by its label."""

    def __init__(self, *, quiet: bool = False) -> None:
        super().__init__(quiet=quiet)
        self.seconds: dict[str, float] = {}

    @contextmanager
    def bar(self, label: str) -> Iterator[Progress]:
        """The bar, timed."""
        began = time.monotonic()
        with super().bar(label) as progress:
            yield progress
        self.seconds[label] = self.seconds.get(label, 0.0) + time.monotonic() - began


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """What the rows of one file share.

    Attributes:
        model: Folder of the dense model.
        work: Where quantized models lie; what is finished there is not made again.
        peers: Folder of the peers' environments.
        source: Text source of calibration and training.
        device: Where scoring and our quantization run.
        dtype: In which both compute, the same for every row.
        calibration_tokens: The same windows for everybody.
        training: Settings of ``train``, the same for everybody.
        test_length: Tokens of a test window.
        test_tokens: Test tokens; None: all.
        quiet: Report nothing.
    """

    model: Path
    work: Path
    peers: Path
    source: str
    device: str
    dtype: Any
    calibration_tokens: int
    training: Mapping[str, Any]
    test_length: int = LENGTH
    test_tokens: int | None = TOKENS
    quiet: bool = False

    def context(self, folder: Path) -> Context:
        """Options and workspace of a chain in ``folder``: effort quick, seed 0."""
        common = Common(
            run=folder,
            model=str(self.model),
            data=self.source,
            device=self.device,
            dtype=str(self.dtype).removeprefix("torch."),
            effort="quick",
        )
        return Context(common=common, workspace=Workspace(folder), reporter=Stopwatch(quiet=self.quiet))

    def settings(self, recipe: Recipe) -> QuantizeSettings:
        """Settings of ``quantize`` for a row of ours."""
        given = {"calibration_tokens": self.calibration_tokens, **recipe.quantize}
        return resolve_settings(QuantizeSettings, given, "quick")

    def measured(self, folder: Path) -> dict[str, Any]:
        """Test perplexity of the model in ``folder``."""
        network = load_model(folder, dtype=self.dtype, device=self.device)
        windows = test_windows(load_tokenizer(self.model), length=self.test_length, tokens=self.test_tokens)
        return score(network, windows, batch_size=max(1, 2048 // self.test_length))

    def stored(self, folder: Path) -> dict[str, Any]:
        """Bits per quantized weight of a checkpoint, and the bytes they come from by the tensors' ending."""
        shapes = linear_shapes(self.model)
        sizes = stored_bytes(folder, list(shapes))
        weights = sum(rows * columns for rows, columns in shapes.values())
        return {"bits_per_weight": 8 * sum(sizes.values()) / weights, "stored_bytes": sizes}


def row_of(bench: Bench, recipe: Recipe) -> dict[str, Any]:
    """Make a row's model and measure it.

    Returns:
        ``perplexity`` and its protocol, ``bits_per_weight``, and where there is something to time ``seconds`` (of
        quantization alone), its parts, ``peak_bytes`` and the load average of the machine before and after. Only
        ``not_run``, the reason, where a peer's environment is missing.

    Raises:
        CompressError: Whatever ``quantize``, ``train`` or the peer refuses.
    """
    if recipe.peer is not None:
        return _peer_row(bench, recipe, recipe.peer)
    if not recipe.quantize:
        return {**bench.measured(bench.model), **bench.stored(bench.model)}
    folder = bench.work / chain_name(bench, recipe)
    context, times = bench.context(folder / "chain"), folder / "times.json"
    folder.mkdir(parents=True, exist_ok=True)
    with context.workspace.locked():
        outcome = _timed(context, times, lambda: _quantized(bench, context, recipe))
        stage = outcome.stage
        assert stage is not None  # only a dry run makes none
        facts = _facts(stage.record, read_json(times) if times.is_file() else {})
        if recipe.train is None:
            return {**bench.measured(stage.path), **bench.stored(stage.path), **facts}
        settings = resolve_settings(TrainSettings, {**bench.training, "method": recipe.train}, "quick")
        load, adapter = os.getloadavg()[0], train(context, settings).stage
        assert adapter is not None
    record, out = adapter.record, folder / "trained"
    shutil.rmtree(out, ignore_errors=True)
    write_packed(Checkpoint(stage.path), out, adapter=adapter.path)
    training = {
        "settings": settings_dict(settings),
        "bits_per_weight_before": bench.stored(stage.path)["bits_per_weight"],
        "validation_loss": [record["metrics"][f"validation_loss_{at}"] for at in ("before", "after")],
        "seconds": record["metrics"]["train_seconds"],
        "peak_bytes": record["peak_memory_bytes"],
        "load_before": load,
    }
    row = {**bench.measured(out), **bench.stored(out), **facts, "training": training}
    shutil.rmtree(out)
    return row


def chain_name(bench: Bench, recipe: Recipe) -> str:
    """Name of the folder of a row's chain; rows of one quantization, trained or not, share it."""
    identity = {
        "model": Checkpoint(bench.model).fingerprint(),
        "source": bench.source,
        "settings": settings_dict(bench.settings(recipe)),
        "uniform": recipe.uniform,
        "config": None if recipe.config is None else recipe.config.to_dict(),
    }
    return digest(identity)[:16]


def _quantized(bench: Bench, context: Context, recipe: Recipe) -> Outcome:
    settings = bench.settings(recipe)
    if recipe.uniform:
        return quantize_uniformly(context, settings, recipe.config)
    return quantize(context, settings)


def _timed(context: Context, path: Path, work: Callable[[], Outcome]) -> Outcome:
    """Do it; the seconds of the bars and the load go to ``path``, unless it had been done before."""
    load = os.getloadavg()[0]
    outcome = work()
    if outcome.fresh and isinstance(context.reporter, Stopwatch):
        times = {"load_before": load, "load_after": os.getloadavg()[0]}
        write_json(path, {"bars": context.reporter.seconds, **times})
    return outcome


def _facts(record: Mapping[str, Any], times: Mapping[str, Any]) -> dict[str, Any]:
    """What a stage of ours recorded, with its times."""
    metrics, bars = record["metrics"], times.get("bars", {})
    parts = {name: bars[name] for name in PARTS if name in bars}
    certificate = metrics.get("allocation", {})
    if "seconds" in certificate:
        parts["solve"] = certificate["seconds"]
    kept = ("objective", "menu", "rank", "budget_includes", "calibration_tokens", "iterations", "dtype")
    return {
        "seconds": sum(parts.values()) if bars else None,
        "seconds_by_part": parts,
        "seconds_of_the_verb": record["seconds"],
        "peak_bytes": record["peak_memory_bytes"],
        "load_before": times.get("load_before"),
        "load_after": times.get("load_after"),
        "settings": {name: record["config"][name] for name in kept},
        "gap": certificate.get("gap"),
        "bits_recorded": metrics["stored_bits_per_weight"],
        "file_bytes": metrics.get("after", {}).get("bytes"),
        "widths": dict(Counter(str(matrix["bits"]) for matrix in metrics["matrices"])),
        "ranks": dict(Counter(str(matrix["rank"]) for matrix in metrics["matrices"])),
        "squared_error": metrics["squared_error"],
        **_rise(metrics, record["config"]["objective"]),
    }


def _rise(metrics: Mapping[str, Any], objective: str) -> dict[str, float]:
    """Rise of the loss on validation text, in nats per token, and with ``hessian`` what the choice predicted."""
    found = {}
    if "after" in metrics:
        before, after = (metrics[at]["perplexity"] for at in ("before", "after"))
        found["loss_rise_on_validation"] = math.log(after / before)
        if objective == "hessian":
            found["loss_rise_predicted"] = metrics["allocation"]["objective"]
    return found


def _peer_row(bench: Bench, recipe: Recipe, peer: str) -> dict[str, Any]:
    environment = bench.peers / peer
    if not (environment / "bin" / "python").is_file():
        return {"not_run": f"{peer} has no environment; `make peers PEERS={peer}` makes it"}
    out = bench.work / f"peer-{peer}"
    shutil.rmtree(out, ignore_errors=True)
    given: list[Any] = [bench.model, out]
    if peer in CALIBRATED:
        context = bench.context(bench.work / "none")
        windows = calibration_windows(context, bench.model, bench.source, tokens=bench.calibration_tokens)
        given.insert(1, windows.ids)
    load = os.getloadavg()[0]
    result = PEERS[peer](*given, environment=environment, threads=torch.get_num_threads(), **recipe.quantize)
    after = os.getloadavg()[0]
    row = {**result.to_dict(), **bench.measured(result.model), "load_before": load, "load_after": after}
    shutil.rmtree(out)  # the dense copy in float32 is large
    return row
