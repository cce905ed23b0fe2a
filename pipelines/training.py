"""The training loop as the verbs use it: settings in, metrics out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from compress.adapters.train import FitConfig, FitResult, fit
from compress.data.windows import Windows
from compress.pipelines.settings import AlignSettings, Common, LoopSettings
from compress.pipelines.stage import Context

if TYPE_CHECKING:  # one process needs none of it
    from compress.adapters.ranks import Ranks

WARMUP = 0.1
"""Share of the steps in which the learning rate rises; at most 100 steps (LoRAM, arXiv 2502.13533, §4)."""


def fit_config(settings: LoopSettings, common: Common) -> FitConfig:
    """The training loop's configuration from a verb's settings and the seed and dtype asked for."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"  # float16 needs loss scaling: left to the loop
    if common.dtype == "float32":
        precision = "float32"
    elif common.dtype == "bfloat16":
        precision = "bfloat16"
    return FitConfig(
        steps=settings.steps,
        micro_batch=settings.micro_batch,
        accumulation=settings.accumulation,
        lr=settings.lr,
        warmup_steps=min(100, int(WARMUP * settings.steps)),
        seed=common.seed,
        precision=precision,
        save_every=max(1, min(50, settings.steps // 4)),
        optimizer=settings.optimizer if isinstance(settings, AlignSettings) else "adamw",
        recompute=settings.recompute,
    )


def training_metrics(result: FitResult) -> dict[str, Any]:
    """What a training run measured, as JSON values."""
    return {
        "losses": [round(loss, 5) if math.isfinite(loss) else None for loss in result.losses],
        "validation_loss_before": result.validation_before,
        "validation_loss_after": result.validation_after,
        "tokens": result.tokens,
        "train_seconds": round(result.seconds, 2),
        "steps": result.steps,
        "skipped_updates": result.skipped,
    }


def announced(context: Context, kind: str, device: str, what: Mapping[str, Any]) -> Ranks | None:
    """Have the other processes build what is trained next; None where this is the only one."""
    return None if context.team is None else context.team.announce(kind, device, what)


def train_model(
    context: Context,
    model: nn.Module,
    windows: Windows,
    config: FitConfig,
    *,
    ranks: Ranks | None,
    **more: Any,
) -> FitResult:
    """``fit``, in as many processes as were launched.

    Args:
        context: Knows of them.
        model: As `compress.adapters.train.fit` takes it.
        windows: The same.
        config: The same.
        ranks: What :func:`announced` returned.
        more: The other arguments of ``fit``.

    Raises:
        CompressError: What ``fit`` raises, here or in another process.
    """
    if context.team is None or ranks is None:
        result = fit(model, windows, config, **more)
    else:
        result = context.team.fit(ranks, model, windows, config, **more)
    if result.skipped:
        context.reporter.say(
            f"{result.skipped} of {result.steps} training steps were skipped: their gradients were not finite."
        )
    return result


def parse_adapter_targets(text: str) -> tuple[str, ...]:
    """``"all,lm_head"`` as a tuple; the model's own names are checked when adapters are attached."""
    return tuple(part.strip() for part in text.split(",") if part.strip())
