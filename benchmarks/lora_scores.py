"""How near LoRA-guided scores come to the same scores with true gradients, and what either keeps.

``python -m compress.benchmarks.lora_scores [--quick] [--ranks 8,64] [--ratio 0.5] [--out FILE]``

An adapter trains on WikiText-2 train for 32 steps of 4 windows of 128 tokens (16,384 tokens, AdamW at 1e-3, alpha twice
the rank, no dropout). Every step gives the importance (G * W)^2 of LoRAPrune twice, at the same weights on the same
tokens: with G estimated from the adapter's gradients, and with G the true gradient. Both go through the same reduction
and the same moving average over steps. ``spearman``: rank correlation over the channels of a layer, mean over layers;
``shared``: of the half of the channels that one keeps, the share that the other keeps too (0.5 is chance). ``all
steps`` is the true gradient's score averaged evenly over all steps: what it shares with the moving average of the same
scores is the most that noise between steps leaves to agree on. Perplexity: the full model with the groups masked
that either score ranks last, nothing repaired; test as in ``compress.benchmarks.pruning``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

from compress.adapters.attach import attach_lora
from compress.benchmarks.protocol import TOKENS, Rows, calibration, score, test_windows
from compress.importance.base import GroupScores, create_criterion
from compress.importance.lora import moving_average
from compress.importance.modules import float_weight, merged_rows
from compress.importance.reduce import axis_of, chunked_sums, group_scores
from compress.model.architecture import Architecture, LinearSpec
from compress.model.checkpoint import Checkpoint, checkpoint_architecture
from compress.model.load import load_model, load_tokenizer, resolve
from compress.pipelines.dispatch import prepare_torch, quiet_libraries
from compress.pipelines.measure import CALIBRATION_SEED
from compress.pipelines.settings import Common
from compress.prune.mask import GroupMasks
from compress.prune.plan import plan_shapes
from compress.prune.select import select

TAKES = ("minutes", "minutes")
NEEDS = ("wikitext2",)

BATCH, LENGTH = 4, 128
MOMENTUM = 0.9
Scores = dict[str, GroupScores]


def true_scores(model: nn.Module, arch: Architecture) -> GroupScores:
    """Group scores from ``(G * W)^2`` with the gradients in ``.grad`` of the decoder weights (METHODS §1.1)."""

    def sums(module: nn.Module, spec: LinearSpec, name: str) -> Tensor:
        gradient = float_weight(module, name).grad
        assert gradient is not None
        weight, grad_OI = merged_rows(module, spec, name), gradient.t() if spec.transposed else gradient
        return chunked_sums(
            weight, lambda chunk: (grad_OI[chunk] * weight.rows(chunk)).square_(), over=axis_of(spec)
        )

    with torch.no_grad():
        return group_scores(model, arch, sums, normalize=True)


def both_scores(path: Path, arch: Architecture, ids_BS: Tensor, rank: int) -> Scores:
    """Scores after training on ``ids_BS``: ``lora``, ``true`` (its moving average) and ``all steps``.

    Args:
        path: The full model.
        arch: Its architecture.
        ids_BS: Token ids, int64 [windows, length].
        rank: Of the adapter.
    """
    adapted = attach_lora(
        load_model(path, dtype=torch.float32), arch, rank=rank, alpha=2 * rank, dropout=0.0, seed=0
    )
    criterion = create_criterion("lora", arch, momentum=MOMENTUM)
    optimizer = torch.optim.AdamW(
        [p for p in adapted.parameters() if p.requires_grad], lr=1e-3, weight_decay=0
    )
    linears = [
        float_weight(adapted.get_base_model().get_submodule(arch.module_name(layer, spec)), "")
        for layer in range(arch.layers)
        for spec in arch.linears_at(layer)
    ]
    for weight in linears:
        weight.requires_grad_(True)
    average: GroupScores | None = None
    total: GroupScores | None = None
    for batch in ids_BS.split(BATCH):
        adapted.zero_grad(set_to_none=True)
        adapted(input_ids=batch, labels=batch, use_cache=False).loss.backward()
        criterion.observe(adapted)
        found = true_scores(adapted, arch)
        average = moving_average(average, found, MOMENTUM)
        total = found if total is None else total.combine(found, torch.add)
        for weight in linears:
            weight.grad = None
        optimizer.step()
    assert average is not None
    assert total is not None
    return {"lora": criterion.scores(), "true": average, "all steps": total}


def agreement(first: GroupScores, second: GroupScores) -> dict[str, float]:
    """``spearman`` and ``shared`` of two scores of the channels, means over the layers."""
    correlations, shares = [], []
    for one, other in zip(first.layers, second.layers, strict=True):
        correlations.append(float(spearmanr(one.channels, other.channels).statistic))
        half = len(one.channels) // 2
        kept = [set(scores.channels.topk(half).indices.tolist()) for scores in (one, other)]
        shares.append(len(kept[0] & kept[1]) / half)
    return {"spearman": sum(correlations) / len(correlations), "shared": sum(shares) / len(shares)}


def fill(
    path: Path,
    rows: Rows,
    ranks: list[int],
    ratio: float,
    ids_BS: Tensor,
    test: Any,
    say: Callable[[str], None],
) -> None:
    """Every row that is not there yet."""
    arch = checkpoint_architecture(Checkpoint(path))
    network = load_model(path, dtype=torch.float32)

    def cut(scores: GroupScores) -> dict[str, Any]:
        plan = plan_shapes("uniform", arch, ratio, scores=scores)
        with GroupMasks(network, arch, select(arch, scores, plan.shapes)):
            return {**score(network, test), "achieved_ratio": plan.achieved, "reason": plan.reason}

    for rank in ranks:
        if rows.has(f"rank {rank}"):
            continue
        scores = both_scores(path, arch, ids_BS, rank)
        row = {
            "lora and true": agreement(scores["lora"], scores["true"]),
            "lora and all steps": agreement(scores["lora"], scores["all steps"]),
            "true and all steps": agreement(scores["true"], scores["all steps"]),
            "cuts": {name: cut(found) for name, found in scores.items()},
        }
        rows.put(f"rank {rank}", row)
        say(line(rank, row))


def line(rank: int, row: dict[str, Any]) -> str:
    """One rank in words."""
    pairs = ", ".join(
        f"{name} {row[name]['spearman']:.2f} ({row[name]['shared']:.2f} of half shared)"
        for name in ("lora and true", "lora and all steps", "true and all steps")
    )
    cuts = ", ".join(f"{name} {found['perplexity']:.1f}" for name, found in row["cuts"].items())
    return f"rank {rank}: {pairs}; perplexity after the cut: {cuts}"


def main() -> int:
    """Command line; one line a rank."""
    parser = argparse.ArgumentParser(
        prog="python -m compress.benchmarks.lora_scores", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--quick", action="store_true", help="few tokens, to see that it runs")
    parser.add_argument("--model", help="default: the embedded model")
    parser.add_argument("--ranks", default="8,64")
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--out", type=Path, default=Path("lora-scores.json"))
    arguments = parser.parse_args()
    quiet_libraries()
    prepare_torch(Common())
    path = resolve(arguments.model)
    tokenizer = load_tokenizer(path)
    tokens, scored = (1024, 1024) if arguments.quick else (16_384, TOKENS)
    windows = calibration(tokenizer, "wikitext2", tokens, CALIBRATION_SEED, length=LENGTH)
    identity = {
        "benchmark": "lora scores",
        "model": Checkpoint(path).fingerprint(),
        "calibration": dict(windows.protocol),
        "ratio": arguments.ratio,
        "test_tokens": scored,
    }
    rows = Rows(arguments.out, identity)
    ranks = [int(part) for part in arguments.ranks.split(",")]
    fill(path, rows, ranks, arguments.ratio, windows.ids, test_windows(tokenizer, tokens=scored), print)
    return 0


if __name__ == "__main__":
    sys.exit(main())
