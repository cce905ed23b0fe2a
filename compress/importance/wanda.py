"""Wanda-sp importance: the size of the weights times the size of the inputs they meet."""

from __future__ import annotations

from typing import ClassVar, get_args

import torch
from torch import nn

from compress.importance import CRITERIA
from compress.importance.activations import ActivationCriterion, Moments
from compress.importance.modules import merged_rows
from compress.importance.reduce import axis_of, chunked_sums
from compress.model.architecture import LinearSpec, Role


@CRITERIA.register("wanda")
class WandaCriterion(ActivationCriterion):
    """``|W_oi| * ||x_i||`` (arXiv 2306.11695), summed over all slices of a group (Wanda-sp, arXiv 2312.11983).

    ``||x_i||`` is the L2 norm of input feature i over all calibration tokens, W the weight with its adapter
    merged.
    """

    roles: ClassVar[frozenset[Role]] = frozenset(get_args(Role))

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
