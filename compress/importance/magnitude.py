"""Magnitude importance: the size of the weights, no data needed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import nn

from compress.errors import UsageError
from compress.importance import CRITERIA
from compress.importance.base import Criterion, CriterionConfig, Needs
from compress.importance.modules import merged_rows
from compress.importance.reduce import axis_of, chunked_sums, group_scores
from compress.model.architecture import LinearSpec

Norm = Literal["l1", "l2"]


@dataclass(frozen=True, slots=True, kw_only=True)
class MagnitudeConfig(CriterionConfig):
    """Settings of the magnitude criterion.

    Attributes:
        norm: Importance of one element: ``|W|`` (l1) or ``W^2`` (l2).
    """

    norm: Norm = "l2"

    def __post_init__(self) -> None:
        CriterionConfig.__post_init__(self)
        if self.norm not in ("l1", "l2"):
            raise UsageError(f"There is no norm {self.norm!r}.", "Choose l1 or l2.")


@CRITERIA.register("magnitude")
class MagnitudeCriterion(Criterion):
    """Sum of ``|W|`` or ``W^2`` over the slices of a group, W being the weight with its adapter merged."""

    needs: ClassVar[Needs] = "weights"
    config_type: ClassVar[type[CriterionConfig]] = MagnitudeConfig

    def observe(self, model: nn.Module) -> None:
        """Score the present weights; a later observation replaces an earlier one."""
        with torch.no_grad():
            found = group_scores(model, self.arch, self._sums, normalize=self.config.normalize)
        if self._counted(found):
            self._scores = found

    def _sums(self, module: nn.Module, spec: LinearSpec, name: str) -> torch.Tensor:
        weight = merged_rows(module, spec, name)
        size = torch.abs if self.config.norm == "l1" else torch.square
        return chunked_sums(
            weight,
            lambda chunk: size(weight.rows(chunk)),
            over=axis_of(spec),
            chunk_elements=self.config.chunk_elements,
        )
