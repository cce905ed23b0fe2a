"""How to train, and what follows from it for each step: learning rate and windows."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from compress.errors import UsageError


@dataclass(frozen=True, slots=True, kw_only=True)
class FitConfig:
    """How to train.

    Attributes:
        steps: Optimizer steps.
        micro_batch: Windows per forward pass.
        accumulation: Forward passes per optimizer step; the loss is the mean over the step's trained tokens.
        lr: Peak learning rate of AdamW.
        schedule: After the linear warm-up: a half cosine to zero, or constant.
        warmup_steps: Steps of linear warm-up.
        max_grad_norm: Gradients are clipped to this global norm after the hooks; 0 turns clipping off.
        weight_decay: AdamW's decoupled weight decay.
        seed: Window order and dropout.
        precision: Compute dtype. "auto": bfloat16 when the base has it or the device computes it natively,
            else float32. Trained parameters keep their own dtype.
        save_every: Steps between two saved states.
        optimizer: "adamw", or "galore": AdamW whose moments of a matrix live in a subspace of its gradients.
        recompute: Run decoder layers again in the backward pass instead of keeping their activations. It changes no
            result, so a run may go on with it that began without.
    """

    steps: int
    micro_batch: int = 4
    accumulation: int = 1
    lr: float = 1e-4
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup_steps: int = 0
    max_grad_norm: float = 1.0
    weight_decay: float = 0.0
    seed: int = 0
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    save_every: int = 50
    optimizer: Literal["adamw", "galore"] = "adamw"
    recompute: bool = False

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the result, as JSON values."""
        return {name: value for name, value in asdict(self).items() if name != "recompute"}

    def __post_init__(self) -> None:
        for field, least in (("steps", 1), ("micro_batch", 1), ("accumulation", 1), ("save_every", 1)):
            if getattr(self, field) < least:
                raise UsageError(f"Training {field} is {getattr(self, field)}.", f"Give at least {least}.")
        if not self.lr > 0:
            raise UsageError(f"The learning rate is {self.lr}.", "Give a positive one.")
        if not 0 <= self.warmup_steps <= self.steps:
            raise UsageError(
                f"The warm-up of {self.warmup_steps} steps does not fit in {self.steps} steps.",
                "Give a number of warm-up steps between 0 and the number of steps.",
            )


def learning_rate(config: FitConfig, step: int) -> float:
    """The learning rate of optimizer step ``step`` (from 0)."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return config.lr * 0.5 * (1 + math.cos(math.pi * progress))


def window_order(count: int, seed: int, start: int, length: int) -> Tensor:
    """Entries ``start .. start + length`` of an endless order of windows, int64 [length].

    The order is one random permutation of ``count`` windows after another; it follows from ``seed`` alone, so
    a resumed run needs no stored position.
    """
    epochs = range(start // count, (start + length - 1) // count + 1)
    generator = torch.Generator()
    orders = [torch.randperm(count, generator=generator.manual_seed(seed * 1_000_003 + e)) for e in epochs]
    first = start - epochs[0] * count
    return torch.cat(orders)[first : first + length]
