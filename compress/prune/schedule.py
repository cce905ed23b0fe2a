"""When to prune: the cubic schedule of LoRAPrune and the group counts it asks for at every step."""

from __future__ import annotations

import math
from dataclasses import dataclass

from compress.errors import UsageError
from compress.structure import LayerShape


def cubic_ratio(
    step: float, total_steps: int, *, initial: float, final: float, warmup: float = 0.1, cooldown: float = 0.1
) -> float:
    """Pruning ratio at ``step`` (LoRAPrune, arXiv 2305.18403 §4; after Zhu and Gupta).

    ``initial`` for ``step < warmup * T``, ``final`` from ``(1 - cooldown) * T`` on, between them
    ``r_f + (r_0 - r_f) (1 - (t - wT) / (T - (w + c) T))^3``.
    """
    start, end = warmup * total_steps, (1 - cooldown) * total_steps
    if step < start:
        return initial
    if step >= end:
        return final
    return final + (initial - final) * (1 - (step - start) / (end - start)) ** 3


@dataclass(frozen=True, slots=True, kw_only=True)
class PruningSchedule:
    """Which share of the pruning is done after optimizer step ``step`` (0 .. total_steps - 1).

    Attributes:
        total_steps: T.
        warmup: Share of T before the first mask.
        cooldown: Share of T trained with the final mask.
        every: Steps between two masks; None: ``max(1, min(10, T // 20))``.
    """

    total_steps: int
    warmup: float = 0.1
    cooldown: float = 0.1
    every: int | None = None

    def __post_init__(self) -> None:
        if self.total_steps < 1:
            raise UsageError(
                f"Pruning over {self.total_steps} steps is not possible.", "Give at least one step."
            )
        if self.every is not None and self.every < 1:
            raise UsageError(f"Masks every {self.every} steps are not possible.", "Give at least 1.")
        if min(self.warmup, self.cooldown) < 0 or self.warmup + self.cooldown > 1:
            raise UsageError(
                f"Warm-up {self.warmup} and cool-down {self.cooldown} do not fit into one run.",
                "Give two shares of at least 0 whose sum is at most 1.",
            )

    @property
    def interval(self) -> int:
        """Steps between two masks."""
        return self.every if self.every is not None else max(1, min(10, self.total_steps // 20))

    def due(self, step: int) -> bool:
        """Whether the mask is recomputed at ``step``: every interval, at cool-down, at the last step."""
        first_cool = math.ceil((1 - self.cooldown) * self.total_steps)
        return step % self.interval == 0 or step == first_cool or step == self.total_steps - 1

    def progress(self, step: int) -> float:
        """Share of the final pruning reached at ``step``, 0 to 1; exactly 1 at the last step."""
        if step >= self.total_steps - 1:
            return 1.0
        return cubic_ratio(
            step, self.total_steps, initial=0.0, final=1.0, warmup=self.warmup, cooldown=self.cooldown
        )

    def kept(self, step: int, full: int, target: int) -> int:
        """Groups of ``full`` kept at ``step`` on the way to ``target``; never rises with ``step``."""
        return full - math.floor(self.progress(step) * (full - target) + 0.5)

    def shape(self, step: int, full: LayerShape, target: LayerShape) -> LayerShape:
        """What a layer keeps at ``step``: its KV groups, query heads in each, and channels, each as `kept` says."""
        return LayerShape(
            kv_heads=self.kept(step, full.kv_heads, target.kv_heads),
            queries=self.kept(step, full.queries, target.queries),
            channels=self.kept(step, full.channels, target.channels),
        )
