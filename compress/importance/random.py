"""Random importance: the baseline every other criterion has to beat."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import nn

from compress.importance import CRITERIA
from compress.importance.base import Criterion, GroupScores, LayerScores


@CRITERIA.register("random")
class RandomCriterion(Criterion):
    """Uniform scores in [0, 1) under ``config.seed``, the same for every model of one architecture."""

    requires_training: ClassVar[bool] = False

    def observe(self, model: nn.Module) -> None:
        """Count the observation; the model does not matter."""
        self.steps += 1

    def scores(self) -> GroupScores:
        """Scores drawn from a generator of their own: equal at every call."""
        generator = torch.Generator().manual_seed(self.config.seed)
        return GroupScores(
            layers=tuple(
                LayerScores(
                    kv_groups=torch.rand(self.arch.kv_heads, generator=generator, dtype=torch.float64),
                    channels=torch.rand(self.arch.channels, generator=generator, dtype=torch.float64),
                )
                for _ in range(self.arch.layers)
            )
        )
