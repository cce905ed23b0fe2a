"""Magnitude importance: the size of the weights, no data needed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import nn

from compress.errors import UsageError
from compress.importance import CRITERIA
from compress.importance.base import Criterion, CriterionConfig, GroupScores
from compress.importance.modules import base_weight, lora_factors
from compress.importance.reduce import group_scores, row_chunks
from compress.model.architecture import LinearSpec
from compress.structure import ROW_ROLES

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

    requires_training: ClassVar[bool] = False
    config_type: ClassVar[type[CriterionConfig]] = MagnitudeConfig
    _scores: GroupScores | None = None

    def observe(self, model: nn.Module) -> None:
        """Score the present weights; a later observation replaces an earlier one."""
        with torch.no_grad():
            found = group_scores(model, self.arch, self._sums, normalize=self.config.normalize)
        self.steps += 1
        if found.finite:
            self._scores = found
        else:
            self.skipped_steps += 1

    def scores(self) -> GroupScores:
        """The scores of the last observation.

        Raises:
            CompressError: Nothing finite was observed.
        """
        if self._scores is None:
            raise self._nothing_observed()
        return self._scores

    def _sums(self, module: nn.Module, spec: LinearSpec, name: str) -> torch.Tensor:
        weight, factors = base_weight(module, spec), lora_factors(module, name)
        rows, columns = weight.shape
        over_rows = spec.role in ROW_ROLES
        sums = torch.zeros(rows if over_rows else columns, dtype=torch.float32, device=weight.device)
        for chunk in row_chunks(weight, self.config.chunk_elements):
            values = weight[chunk].float()
            if factors is not None:
                values = torch.addmm(
                    values, factors.b[chunk].float(), factors.a.float(), alpha=factors.scaling
                )
            values = values.abs() if self.config.norm == "l1" else values.square()
            if over_rows:
                sums[chunk] = values.sum(dim=1)
            else:
                sums += values.sum(dim=0)
        return sums
