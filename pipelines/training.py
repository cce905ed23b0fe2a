"""The training loop as the verbs use it: settings in, metrics out."""

from __future__ import annotations

from typing import Any

from compress.adapters.train import FitConfig, FitResult
from compress.pipelines.settings import TrainingSettings

WARMUP = 0.1
"""Share of the steps in which the learning rate rises; at most 100 steps (LoRAM, arXiv 2502.13533, §4)."""


def fit_config(settings: TrainingSettings, seed: int) -> FitConfig:
    """The training loop's configuration from a verb's settings."""
    return FitConfig(
        steps=settings.steps,
        micro_batch=settings.micro_batch,
        accumulation=settings.accumulation,
        lr=settings.lr,
        warmup_steps=min(100, int(WARMUP * settings.steps)),
        seed=seed,
        save_every=max(1, min(50, settings.steps // 4)),
    )


def training_metrics(result: FitResult) -> dict[str, Any]:
    """What a training run measured, as JSON values."""
    return {
        "losses": [round(loss, 5) for loss in result.losses],
        "validation_loss_before": result.validation_before,
        "validation_loss_after": result.validation_after,
        "tokens": result.tokens,
        "train_seconds": round(result.seconds, 2),
        "steps": result.steps,
    }
