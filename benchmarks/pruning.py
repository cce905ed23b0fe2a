"""Structured pruning methods at the same size: perplexity before and after the same recovery training.

``python -m compress.benchmarks.pruning [--part table|headline] [--ratios 0.5,0.2] [--only NAMES] [--seeds N]``

Protocol. Model SmolLM2-135M-Instruct (dequantized baseline). Every method sees the same calibration tokens of
WikiText-2 train (one seed) and keeps the same number of groups in all layers, each by its own ranking; which share of
the ratio heads and channels bear is its own choice too, except for the peer, whose pruner sets limits. "0 tokens" is
the model as the method leaves it, with what belongs to it (FLAP's bias, our refit). "100k tokens" is that model after
LoRA training on the same windows of WikiText-2 train with the same settings, loss of the text, merged ("ours,
distilled": half the text, half the full model's predictions; "only": these alone, as ``prune`` repairs by default;
"features": half and half, with the distance of the hidden states added). LoRAPrune is trained while it prunes: its 100k
tokens are those, with the paper's schedule; its row at 0 tokens ranks by scores gathered while as many tokens as the
others see for calibration are trained, and cuts the untrained model at once. "ours, two rounds" at 100k has half of the
training after each round. ``--control``: the model that is not pruned after the same training, which no pruned model
can be expected to pass. Test: raw WikiText-2 test, blank lines kept, joined by two line ends, no BOS, consecutive
windows, first 20,480 tokens. Nothing is chosen by it.

The part headline: the two best of ``--table`` at its ratios after recovery, with three seeds, calibration and training
on C4, whole test at 2048.
Rows are on disk as soon as they are known: run it again to go on.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from compress.benchmarks.peers.torch_pruning import prune_with_torch_pruning
from compress.benchmarks.protocol import LENGTH, TOKENS, Rows, calibration, score, test_windows
from compress.benchmarks.pruning_methods import METHODS, PEER, PEER_MLP
from compress.errors import UsageError
from compress.evaluate.latency import throughput
from compress.model.checkpoint import Checkpoint, copy_side_files
from compress.model.load import load_model, load_tokenizer, resolve
from compress.pipelines.dispatch import prepare_torch, quiet_libraries
from compress.pipelines.measure import CALIBRATION_SEED
from compress.pipelines.model_input import device_and_dtype, open_model
from compress.pipelines.prune import prune_in_rounds
from compress.pipelines.prune_goal import default_multiple, goal_of
from compress.pipelines.prune_place import Place
from compress.pipelines.prune_repair import train_repair
from compress.pipelines.reporter import Reporter
from compress.pipelines.settings import Common, PruneSettings
from compress.pipelines.settings import resolve as resolve_settings
from compress.pipelines.stage import Context
from compress.pipelines.workspace import Workspace, read_json

TAKES = ("hours", "minutes")
NEEDS = ("wikitext2",)

CALIBRATION = 16_384
MICRO_BATCH, SEQUENCE = 4, 128
TURNS = 7
"""In which speeds are measured."""
DTYPE = "float32"
"""Of everything, whatever the machine prefers: rows measured on different machines can share a table."""
RECOVERY: dict[str, Any] = {
    "micro_batch": MICRO_BATCH,
    "sequence": SEQUENCE,
    "repair_rank": 16,
    "repair_lr": 1e-3,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """What the rows of one file share.

    Attributes:
        place: Where to compute and what to read.
        model: Folder of the full model.
        calibration_tokens: For every method.
        recovery_tokens: Of recovery training.
        test_length: Tokens of a test window.
        test_tokens: Test tokens; None: all.
    """

    place: Place
    model: Path
    calibration_tokens: int
    recovery_tokens: int
    test_length: int = LENGTH
    test_tokens: int | None = TOKENS

    @property
    def steps(self) -> int:
        """Optimizer steps of recovery training."""
        return round(self.recovery_tokens / (MICRO_BATCH * SEQUENCE))

    def settings(self, ratio: float, **given: Any) -> PruneSettings:
        """Settings of ``prune`` for this benchmark."""
        shared = {
            "ratio": ratio,
            "calibration_tokens": self.calibration_tokens,
            "repair_steps": 0,
            **RECOVERY,
        }
        return resolve_settings(PruneSettings, {**shared, **given}, "quick")

    def measured(self, folder: Path) -> dict[str, Any]:
        """Test perplexity and size of the model in ``folder``."""
        network = self.place.load(folder)
        windows = test_windows(load_tokenizer(self.model), length=self.test_length, tokens=self.test_tokens)
        checkpoint = Checkpoint(folder)
        return {
            **score(network, windows, batch_size=max(1, 2048 // self.test_length)),
            "parameters": checkpoint.parameters,
            "bytes": checkpoint.bytes,
        }

    def speed(self, folder: Path) -> dict[str, float]:
        """Prefill and greedy decoding in tokens a second, batch 1, prompt of 512, beside the full model's in turns.

        Medians of :data:`TURNS`; a ratio is the median of those within a turn, which a busy machine moves less.
        """
        prompt = test_windows(load_tokenizer(self.model), length=LENGTH, tokens=LENGTH).ids[:1]
        small, full = self.place.load(folder), self.place.load(self.model)
        turns = [
            tuple(throughput(network, prompt, decode_tokens=32, repeats=1) for network in (small, full))
            for _ in range(TURNS)
        ]
        found: dict[str, float] = {"turns": TURNS}
        for kind in ("prefill", "decode"):
            pairs = [[getattr(one, f"{kind}_tokens_per_second") for one in turn] for turn in turns]
            found[f"{kind}_tokens_per_second"] = statistics.median(pair[0] for pair in pairs)
            found[f"{kind}_tokens_per_second_of_full"] = statistics.median(pair[1] for pair in pairs)
            found[f"{kind}_ratio"] = statistics.median(pair[0] / pair[1] for pair in pairs)
        return found


def cut(bench: Bench, name: str, ratio: float, out: Path, settings: PruneSettings) -> dict[str, Any]:
    """The method's pruned model in ``out``, before any recovery; what it measured on the way."""
    started = time.monotonic()
    out.mkdir()
    if name in (PEER, PEER_MLP):
        seed = bench.place.context.common.seed + CALIBRATION_SEED
        windows = calibration(load_tokenizer(bench.model), bench.place.source, bench.calibration_tokens, seed)
        small, facts = prune_with_torch_pruning(
            load_model(bench.model, dtype=torch.float32),
            ratio,
            importance="taylor",
            calibration_ids=windows.ids,
            heads=name == PEER,
        )
        small.to(torch.bfloat16).save_pretrained(out)
        copy_side_files(bench.model, out)
    else:
        model = open_model(bench.place.context, str(bench.model))
        goal = goal_of(model, settings, ("heads", "mlp"), default_multiple(model.architecture.channels))
        facts = prune_in_rounds(bench.place, goal, out)
        for folder in out.glob("round-*"):
            shutil.rmtree(folder)
    wanted = (
        "achieved_ratio",
        "shape",
        "reason",
        "heads",
        "kv_heads",
        "channels",
        "note",
        "certificate",
        "trials",
    )
    return {
        **{key: facts[key] for key in wanted if facts.get(key) is not None},
        "prune_seconds": round(time.monotonic() - started, 1),
    }


def run_method(
    bench: Bench,
    rows: Rows,
    name: str,
    ratio: float,
    folder: Path,
    *,
    timed: bool,
    recovery: bool,
    suffix: str = "",
) -> None:
    """The rows of one method at one ratio, with or without ``recovery``; ``suffix`` ends their names."""
    method = METHODS[name]
    before, after = f"{ratio} {name} 0{suffix}", f"{ratio} {name} {bench.recovery_tokens}{suffix}"
    steps = bench.steps
    if recovery and method.trained is not None and not rows.has(after):
        between = {"repair_steps": steps} if "rounds" in method.trained else {}
        settings = bench.settings(ratio, steps=steps, **between, **method.trained)
        facts = cut(bench, name, ratio, folder / "trained", settings)
        rows.put(after, {**bench.measured(folder / "trained"), **facts})
    recovers = recovery and method.recovers and method.trained is None
    if rows.has(before) and (not recovers or rows.has(after)):
        return
    calibration_steps = max(1, bench.calibration_tokens // (MICRO_BATCH * SEQUENCE))
    settings = bench.settings(ratio, steps=calibration_steps, **method.prune)
    facts = cut(bench, name, ratio, folder / "cut", settings)
    speed = {"speed": bench.speed(folder / "cut")} if timed else {}
    rows.put(before, {**bench.measured(folder / "cut"), **facts, **speed})
    if recovers:
        settings = bench.settings(ratio, **{**method.recovery, "repair_steps": steps})
        rows.put(after, {**facts, **trained_further(bench, folder / "cut", folder, settings)})


def trained_further(bench: Bench, start: Path, folder: Path, settings: PruneSettings) -> dict[str, Any]:
    """What the model in ``start`` is after recovery training, which works in ``folder``."""
    started = time.monotonic()
    (folder / "out").mkdir()
    training = train_repair(bench.place, start, bench.model, settings, folder / "out", folder / "state")
    seconds = round(time.monotonic() - started, 1)
    return {
        **bench.measured(folder / "out"),
        "recovery_seconds": seconds,
        "recovery_tokens": training["tokens"],
        "recovery_loss": [training["losses"][0], training["losses"][-1]],
    }


def best_two(path: Path, ratios: list[float], tokens: int) -> list[str]:
    """The two methods with the lowest perplexity after recovery at the first ratio; variants of ours count once."""
    rows = read_json(path)["rows"]
    found = {
        name: rows[key]["perplexity"]
        for name in METHODS
        if (key := f"{ratios[0]} {name} {tokens}") in rows and not name.startswith("ours,")
    }
    if len(found) < 2:
        raise UsageError(f"{path} does not hold two methods after recovery.", "Run the part table first.")
    return sorted(found, key=lambda name: found[name])[:2]


def table(rows: Rows, ratios: list[float], tokens: int, suffix: str = "") -> str:
    """The rows as text, one line a method; ``suffix`` ends the names of the rows of one seed."""
    lines = [f"{'method':28}" + "".join(f"{r:>10} (0){r:>9} ({tokens // 1000}k)" for r in ratios)]
    for name in METHODS:
        keys = [f"{ratio} {name} {count}{suffix}" for ratio in ratios for count in (0, tokens)]
        if any(rows.has(key) for key in keys):
            cells = [
                f"{rows.get(key)['perplexity']:14.2f}" if rows.has(key) else f"{'-':>14}" for key in keys
            ]
            lines.append(f"{name:28}" + "".join(cells))
    if rows.has("dense"):
        lines.append(f"dense {rows.get('dense')['perplexity']:.2f}; {rows.get('dense')['protocol_line']}")
    return "\n".join(lines)


def bench_of(model: Path, source: str, seed: int, workspace: Path, **sizes: Any) -> Bench:
    """A benchmark on this machine's device."""
    common = Common(run=workspace, model=str(model), data=source, seed=seed, effort="quick", dtype=DTYPE)
    prepare_torch(common)
    device, dtype = device_and_dtype(common)
    context = Context(common=common, workspace=Workspace(workspace), reporter=Reporter(quiet=False))
    place = Place(context=context, source=source, device=device, dtype=dtype)
    return Bench(place=place, model=model, **sizes)


def main() -> int:
    """Command line; the table is printed last."""
    parser = argparse.ArgumentParser(
        prog="python -m compress.benchmarks.pruning", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--quick", action="store_true", help="few tokens, to see that it runs")
    parser.add_argument("--part", choices=("table", "headline"), default="table")
    parser.add_argument("--model", help="default: the embedded model")
    parser.add_argument("--ratios", default="0.5,0.2")
    parser.add_argument("--no-recovery", action="store_true", help="only the rows before recovery training")
    parser.add_argument("--only", help="methods, separated by ;")
    parser.add_argument("--seeds", help="separated by commas (default: 0; of headline: 0,1,2)")
    parser.add_argument("--control", action="store_true", help="also train the model that is not pruned")
    parser.add_argument(
        "--table", type=Path, default=Path("pruning-table.json"), help="where headline finds the two best"
    )
    parser.add_argument("--out", type=Path, help="JSON file (default: pruning-PART.json)")
    arguments = parser.parse_args()
    quiet_libraries()
    model = resolve(arguments.model)
    sizes: dict[str, Any] = {"calibration_tokens": CALIBRATION, "recovery_tokens": 100_352}
    source, headline = "wikitext2", arguments.part == "headline"
    seeds = [int(part) for part in (arguments.seeds or ("0,1,2" if headline else "0")).split(",")]
    suffixes = {seed: f" seed {seed}" if headline or len(seeds) > 1 else "" for seed in seeds}
    if headline:
        source = "c4"
        sizes |= {"test_length": 2048, "test_tokens": None}
    if arguments.quick:
        sizes |= {
            "calibration_tokens": 2048,
            "recovery_tokens": 2048,
            "test_tokens": 2048,
            "test_length": LENGTH,
        }
    ratios = [float(part) for part in arguments.ratios.split(",")]
    names = [name.strip() for name in arguments.only.split(";")] if arguments.only else list(METHODS)
    if arguments.part == "headline" and not arguments.only:
        names = best_two(arguments.table, ratios, int(sizes["recovery_tokens"]))
    out = arguments.out or Path(f"pruning-{arguments.part}.json")
    identity = {
        "benchmark": "pruning",
        "part": arguments.part,
        "source": source,
        "dtype": DTYPE,
        "recovery": RECOVERY,
        **sizes,
    }
    rows = Rows(out, {**identity, "model": Checkpoint(model).fingerprint()})
    for seed in seeds:
        with tempfile.TemporaryDirectory() as work:
            bench = bench_of(model, source, seed, Path(work) / "run", **sizes)
            if not rows.has("dense"):
                rows.put("dense", bench.measured(model))
            control = f"dense {bench.recovery_tokens}{suffixes[seed]}"
            if arguments.control and not rows.has(control):
                folder = Path(work) / "control"
                folder.mkdir()
                training = bench.settings(0.5, repair_loss="text", repair_steps=bench.steps)
                rows.put(control, trained_further(bench, model, folder, training))
            for ratio in ratios:
                for name in names:
                    folder = Path(work) / "method"
                    folder.mkdir()
                    timed = arguments.part == "table" and name == "ours"
                    run_method(
                        bench,
                        rows,
                        name,
                        ratio,
                        folder,
                        timed=timed,
                        recovery=not arguments.no_recovery,
                        suffix=suffixes[seed],
                    )
                    shutil.rmtree(folder)
    for seed in seeds:
        print(table(rows, ratios, int(sizes["recovery_tokens"]), suffixes[seed]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
