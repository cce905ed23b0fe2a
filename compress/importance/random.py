"""Random importance: the baseline every other criterion has to beat."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import nn

from compress.importance import CRITERIA
from compress.importance.base import Criterion, GroupScores, LayerScores, Needs


@CRITERIA.register("random")
class RandomCriterion(Criterion):
    """Uniform scores in [0, 1) under ``config.seed``, the same for every model of one architecture."""

    needs: ClassVar[Needs] = "weights"

    def observe(self, model: nn.Module) -> None:
        """Count the observation; the model does not matter."""
        self.steps += 1

    def scores(self) -> GroupScores:
        """Scores drawn from a generator of their own: equal at every call."""
        generator = torch.Generator().manual_seed(self.config.seed)

        def draw(count: int) -> torch.Tensor:
            return torch.rand(count, generator=generator, dtype=torch.float64)

        sizes = [self.arch.at(layer) for layer in range(self.arch.layers)]
        units = [(draw(size.kv_heads), draw(size.channels)) for size in sizes]
        heads = [draw(size.heads) for size in sizes]  # last: the units are drawn the same without them
        return GroupScores(
            layers=tuple(
                LayerScores(kv_groups=kv_groups, channels=channels, query_heads=query_heads)
                for (kv_groups, channels), query_heads in zip(units, heads, strict=True)
            )
        )
