"""Wanda-sp importance: the size of the weights times the size of the inputs they meet."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import nn

from compress.errors import UsageError
from compress.importance import CRITERIA
from compress.importance.activations import ActivationCriterion, Moments
from compress.importance.base import CriterionConfig
from compress.importance.modules import merged_rows
from compress.importance.reduce import axis_of, chunked_sums
from compress.model.architecture import Architecture, LinearSpec, Role


@dataclass(frozen=True, slots=True, kw_only=True)
class WandaConfig(CriterionConfig):
    """Settings of the Wanda-sp criterion.

    Attributes:
        linears: Slices that count: those of "all" linears of a group, or of the "outputs" o and down alone.
    """

    linears: Literal["all", "outputs"] = "all"

    def __post_init__(self) -> None:
        CriterionConfig.__post_init__(self)
        if self.linears not in ("all", "outputs"):
            raise UsageError(f"There are no linears {self.linears!r}.", "Choose all or outputs.")


@CRITERIA.register("wanda")
class WandaCriterion(ActivationCriterion):
    """``|W_oi| * ||x_i||`` (arXiv 2306.11695), summed over all slices of a group (Wanda-sp, arXiv 2312.11983).

    ``||x_i||`` is the L2 norm of input feature i over all calibration tokens, W the weight with its adapter
    merged.
    """

    config_type: ClassVar[type[CriterionConfig]] = WandaConfig

    def __init__(self, arch: Architecture, config: CriterionConfig | None = None) -> None:
        super().__init__(arch, config)
        every = frozenset[Role](get_args(Role))
        self.roles = every if self.config.linears == "all" else frozenset[Role]({"o", "down"})

    def linear_sums(self, module: nn.Module, spec: LinearSpec, name: str, inputs: Moments) -> torch.Tensor:
        """The importance of the rows [out], or of the columns [in] of o and down."""
        weight = merged_rows(module, spec, name)
        norm_I = inputs.norm.to(weight.device, weight.dtype)
        return chunked_sums(
            weight,
            lambda chunk: weight.rows(chunk).abs().mul_(norm_I),
            over=axis_of(spec),
            chunk_elements=self.config.chunk_elements,
        )
