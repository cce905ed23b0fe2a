"""Taylor importance: the first-order change of the loss, with true gradients of the weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import nn

from compress.errors import CompressError, UsageError
from compress.importance import CRITERIA
from compress.importance.base import Criterion, CriterionConfig, Needs
from compress.importance.modules import float_weight, merged_rows
from compress.importance.reduce import axis_of, chunked_sums, group_scores
from compress.model.architecture import LinearSpec

Form = Literal["element", "vector"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TaylorConfig(CriterionConfig):
    """Settings of the Taylor criterion.

    Attributes:
        form: Of a group's slice of a linear, the sum of ``|g * W|`` over its elements (element), or
            ``|sum of g * W|`` (vector), the first-order change of the loss when the whole slice goes.
    """

    form: Form = "element"

    def __post_init__(self) -> None:
        CriterionConfig.__post_init__(self)
        if self.form not in ("element", "vector"):
            raise UsageError(f"There is no Taylor form {self.form!r}.", "Choose element or vector.")


@CRITERIA.register("taylor")
class TaylorCriterion(Criterion):
    """First-order Taylor importance, the element and vector forms of LLM-Pruner (arXiv 2305.11627).

    Before ``observe``, the weights of all decoder linears carry in ``.grad`` the gradient of the *mean* loss
    over the calibration text, summed up over its batches by the caller. W is the weight with its adapter
    merged. The scores of several observations are added.
    """

    needs: ClassVar[Needs] = "gradients"
    config_type: ClassVar[type[CriterionConfig]] = TaylorConfig

    def observe(self, model: nn.Module) -> None:
        """Add the scores of the present weights and gradients.

        Raises:
            CompressError: A weight has no gradient, or is quantized and can have none.
        """
        with torch.no_grad():
            found = group_scores(
                model,
                self.arch,
                self._sums,
                normalize=self.config.normalize,
                absolute=self.config.form == "vector",
            )
        if self._counted(found):
            self._scores = found if self._scores is None else self._scores.combine(found, torch.add)

    def _sums(self, module: nn.Module, spec: LinearSpec, name: str) -> torch.Tensor:
        gradient = float_weight(module, name).grad
        if gradient is None:
            raise CompressError(
                f"The weight of {name} has no gradient.",
                "Run a backward pass with trainable decoder weights before scoring.",
            )
        weight = merged_rows(module, spec, name)
        grad_OI = gradient.t() if spec.transposed else gradient

        def importance(chunk: slice) -> torch.Tensor:
            change = grad_OI[chunk].to(weight.dtype) * weight.rows(chunk)
            return change.abs_() if self.config.form == "element" else change

        return chunked_sums(weight, importance, over=axis_of(spec), chunk_elements=self.config.chunk_elements)
