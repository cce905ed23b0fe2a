"""Perplexity against ratio for every criterion, without any training after the cut.

``python -m compress.benchmarks.pruning_curve [--quick] [--ratios 0.1,0.2,0.3,0.4,0.5,0.6] [--out FILE]``

Every criterion scores the full model once, on the same calibration tokens; each ratio is then a mask on that model, at
the uniform shape that the criterion's own scores choose. "obs + refit" also refits o and down, as ``prune`` does by
default. Model, text and test as in ``compress.benchmarks.pruning``. The report draws the curve from the rows.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compress.adapters.attach import attach_lora
from compress.adapters.train import FitConfig, fit
from compress.benchmarks.protocol import LENGTH, TOKENS, Rows, calibration, score, test_windows
from compress.data.windows import Windows
from compress.importance.base import Criterion, GroupScores, create_criterion
from compress.importance.collect import collect
from compress.importance.gram_store import GramStore
from compress.model.architecture import Architecture
from compress.model.checkpoint import Checkpoint, checkpoint_architecture
from compress.model.load import load_model, load_tokenizer, resolve
from compress.pipelines.dispatch import prepare_torch, quiet_libraries
from compress.pipelines.measure import CALIBRATION_SEED, summed_loss
from compress.pipelines.prune_refit import stored_weight
from compress.pipelines.settings import Common
from compress.prune.compensate import gather_moments, refit_from_store, swapped
from compress.prune.mask import GroupMasks
from compress.prune.plan import plan_shapes
from compress.prune.select import select
from compress.structure import structure_map

TAKES = ("hours", "minutes")
NEEDS = ("wikitext2",)

CRITERIA: dict[str, dict[str, Any]] = {
    "random": {},
    "magnitude": {},
    "taylor": {"form": "vector"},
    "wanda": {},
    "flap": {},
    "lora": {},
    "obs": {},
}
DTYPE = torch.float32
"""Of scoring and of the test, whatever the machine prefers: curves of different machines can share a picture."""
SHORT = 128
REFIT = "obs + refit"


class _Observer:
    """A training hook that only scores."""

    def __init__(self, criterion: Criterion, model: nn.Module) -> None:
        self._criterion, self._model = criterion, model

    def before_step(self, step: int) -> None:
        """Observe the gradients of step ``step``."""
        self._criterion.observe(self._model)


def scores_of(name: str, path: Path, arch: Architecture, windows: Windows) -> GroupScores:
    """Scores of one criterion on the full model; ``lora`` reads the same tokens in shorter windows while it trains."""
    network = load_model(path, dtype=DTYPE)
    criterion = create_criterion(name, arch, **CRITERIA[name])
    if criterion.needs == "adapters":
        ids = windows.ids.view(-1, SHORT)
        short = Windows(ids=ids, labels=ids.clone(), protocol=windows.protocol)
        adapted = attach_lora(network, arch, rank=8, alpha=16, dropout=0.0, seed=0)
        config = FitConfig(steps=len(ids) // 4, micro_batch=4, lr=1e-3, warmup_steps=len(ids) // 40)
        fit(adapted, short, config, hooks=[_Observer(criterion, adapted)])
    else:
        collect(criterion, network, arch, windows.ids, loss=summed_loss(network), batch=4)
    return criterion.scores()


def curve(
    path: Path,
    rows: Rows,
    ratios: list[float],
    windows: Windows,
    test: Windows,
    store: GramStore,
    say: Callable[[str], None],
) -> None:
    """Every row that is not there yet; the moments for the refit go into ``store``."""
    checkpoint = Checkpoint(path)
    arch = checkpoint_architecture(checkpoint)
    network = load_model(path, dtype=DTYPE)

    def weight_of(module: str) -> Tensor:
        return stored_weight(checkpoint, arch, module)

    if not rows.has("dense"):
        rows.put("dense", score(network, test))
    for name in CRITERIA:
        labels = [name, REFIT] if name == "obs" else [name]
        wanted = [(label, r) for label in labels for r in ratios if not rows.has(f"{r} {label} 0")]
        if not wanted:
            continue
        scores = scores_of(name, path, arch, windows)
        if any(label == REFIT for label, _ in wanted):
            gather_moments(network, arch, windows.ids, store)
        for label, ratio in wanted:
            plan = plan_shapes("uniform", arch, ratio, scores=scores)
            layers = select(arch, scores, plan.shapes)
            if label == REFIT:
                structure = structure_map(arch, layers, base_fingerprint="")
                weights = refit_from_store(weight_of, arch, structure, store)
                with swapped(network, arch, weights), GroupMasks(network, arch, layers):
                    found = score(network, test)
            else:
                with GroupMasks(network, arch, layers):
                    found = score(network, test)
            rows.put(f"{ratio} {label} 0", {**found, "achieved_ratio": plan.achieved, "reason": plan.reason})
            say(f"{label} at {ratio}: {found['perplexity']:.2f}")


def main() -> int:
    """Command line; one line a row."""
    parser = argparse.ArgumentParser(
        prog="python -m compress.benchmarks.pruning_curve", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--quick", action="store_true", help="few tokens, to see that it runs")
    parser.add_argument("--model", help="default: the embedded model")
    parser.add_argument("--ratios", default="0.1,0.2,0.3,0.4,0.5,0.6")
    parser.add_argument("--out", type=Path, default=Path("pruning-curve.json"))
    arguments = parser.parse_args()
    quiet_libraries()
    prepare_torch(Common())
    path = resolve(arguments.model)
    tokenizer = load_tokenizer(path)
    tokens, scored = (2048, 2048) if arguments.quick else (16_384, TOKENS)
    windows = calibration(tokenizer, "wikitext2", tokens, CALIBRATION_SEED)
    test = test_windows(tokenizer, tokens=scored)
    identity = {
        "benchmark": "pruning curve",
        "dtype": str(DTYPE).removeprefix("torch."),
        "model": Checkpoint(path).fingerprint(),
    }
    rows = Rows(arguments.out, {**identity, "calibration": dict(windows.protocol), "test_length": LENGTH})
    ratios = [float(part) for part in arguments.ratios.split(",")]
    with tempfile.TemporaryDirectory() as folder:
        curve(path, rows, ratios, windows, test, GramStore(Path(folder)), print)
    return 0


if __name__ == "__main__":
    sys.exit(main())
