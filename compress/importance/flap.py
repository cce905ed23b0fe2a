"""FLAP importance: how much the inputs of o and down fluctuate, times the weights that read them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from compress.importance import CRITERIA
from compress.importance.activations import ActivationCriterion, Moments
from compress.importance.base import CriterionConfig, GroupScores
from compress.importance.modules import merged_rows
from compress.importance.reduce import chunked_sums
from compress.model.architecture import LinearSpec, Role


@dataclass(frozen=True, slots=True, kw_only=True)
class FlapConfig(CriterionConfig):
    """Settings of the FLAP criterion.

    Attributes:
        standardize: Give the KV groups, the channels and the query heads of every layer mean 0 and standard
            deviation 1, for one ranking over all layers. Half of the scores are negative then.
    """

    standardize: bool = False


@CRITERIA.register("flap")
class FlapCriterion(ActivationCriterion):
    """Fluctuation (FLAP, arXiv 2312.11983): sample variance of an input feature times its column's squared norm.

    Only the columns of o and down count. A feature that hardly varies can be replaced by its mean, which a
    bias takes over; the criterion assumes that this is done. W is the weight with its adapter merged.
    """

    roles = frozenset[Role]({"o", "down"})
    config_type: ClassVar[type[CriterionConfig]] = FlapConfig

    def scores(self) -> GroupScores:
        """The scores of the last observation, standardised when the settings say so.

        Raises:
            CompressError: Nothing finite was observed.
        """
        scores = super().scores()
        return scores.combine(scores, _standardized) if self.config.standardize else scores

    def linear_sums(self, module: nn.Module, spec: LinearSpec, name: str, inputs: Moments) -> torch.Tensor:
        """The fluctuation of every input column [in]."""
        weight = merged_rows(module, spec, name)
        squares_I = chunked_sums(
            weight,
            lambda chunk: weight.rows(chunk).square(),
            over="columns",
            chunk_elements=self.config.chunk_elements,
        )
        return squares_I * inputs.variance


def _standardized(score: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    """z-scores with the standard deviation of the whole vector; zeros where it is 0."""
    centred = score - score.mean()
    spread = centred.square().mean().sqrt()
    return centred / spread if spread > 0 else torch.zeros_like(centred)
