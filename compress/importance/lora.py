"""LoRA-guided importance: the gradient of the frozen weights, estimated from the adapter's gradients alone.

LoRAPrune (arXiv 2305.18403). Shapes: O output rows, I input columns, R rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import nn

from compress.errors import CompressError, UsageError
from compress.importance import CRITERIA
from compress.importance.base import Criterion, CriterionConfig, GroupScores, Needs
from compress.importance.modules import WeightRows, lora_factors, weight_rows
from compress.importance.reduce import Axis, axis_of, chunked_sums, group_scores, row_chunks
from compress.kernels.calling import serves_blocks
from compress.kernels.importance import importance_sums
from compress.model.architecture import LinearSpec

Element = Literal["square", "abs"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraConfig(CriterionConfig):
    """Settings of the LoRA-guided criterion.

    Attributes:
        element: Importance of one element: ``(G * W)^2`` (the paper) or ``|G * W|``.
        first_order: Leave out the term ``gB gA`` of the estimate, which is quadratic in the loss scale.
        momentum: Weight of the past in the moving average of the group scores.
    """

    element: Element = "square"
    first_order: bool = False
    momentum: float = 0.9

    def __post_init__(self) -> None:
        CriterionConfig.__post_init__(self)
        if self.element not in ("square", "abs"):
            raise UsageError(f"There is no element importance {self.element!r}.", "Choose square or abs.")
        if not 0 <= self.momentum < 1:
            raise UsageError(f"The momentum {self.momentum} is not in [0, 1).", "Give a value such as 0.9.")


def gradient_factors(
    a_RI: torch.Tensor,
    b_OR: torch.Tensor,
    grad_a_RI: torch.Tensor,
    grad_b_OR: torch.Tensor,
    *,
    first_order: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """LoRAPrune's estimate G of the gradient of a frozen weight (arXiv 2305.18403 §3.2), as a product.

    One imaginary SGD step of size 1 on A and B changes BA by ``G = gB A + B gA - gB gA``. The LoRA scale s
    enters through the gradients (``gB = s G* A^T``, ``gA = s B^T G*`` for the true gradient G*), so without
    the last term ``G = s (G* A^T A + B B^T G*)``. The weight ``W0 + s B A`` itself would move by ``s G``: a
    constant factor of a linear, which the normalisation per linear removes; the estimate is used as the
    paper writes it.

    Args:
        a_RI: LoRA A.
        b_OR: LoRA B.
        grad_a_RI: Gradient of A, unscaled.
        grad_b_OR: Gradient of B, unscaled.
        first_order: Leave out ``gB gA``.

    Returns:
        Left [O, 2R] and right [2R, I] factor: any rows of G are those of the left one times the right one.
    """
    inner_RI = a_RI if first_order else a_RI - grad_a_RI
    return torch.cat([grad_b_OR, b_OR], dim=1), torch.cat([inner_RI, grad_a_RI], dim=0)


def lora_group_sums(
    weight: WeightRows,
    a_RI: torch.Tensor,
    b_OR: torch.Tensor,
    grad_a_RI: torch.Tensor,
    grad_b_OR: torch.Tensor,
    *,
    scaling: float,
    over: Axis,
    element: Element = "square",
    first_order: bool = False,
    chunk_elements: int | None = None,
) -> torch.Tensor:
    """Importance of a linear's elements, summed over each row [O] or each column [I] (LoRAPrune §3.2).

    The element importance is ``(G * W)^2`` or ``|G * W|`` with ``G`` of :func:`gradient_factors` and the
    merged weight ``W = W0 + scaling * B A``. Neither G nor W nor the importance exists for more than one
    chunk of rows.

    Args:
        weight: Frozen weight W0; computed in its type, float32 or float64.
        a_RI: LoRA A.
        b_OR: LoRA B.
        grad_a_RI: Its gradient, averaged over accumulation, neither scaled nor clipped.
        grad_b_OR: Likewise for B.
        scaling: The LoRA scale s.
        over: "rows": one sum for each output row; "columns": one for each input column.
        element: Square or absolute value.
        first_order: Leave out ``gB gA``.
        chunk_elements: Elements of a chunk; None: see :func:`row_chunks`.
    """
    a, b, grad_a, grad_b = (
        tensor.detach().to(weight.device, weight.dtype) for tensor in (a_RI, b_OR, grad_a_RI, grad_b_OR)
    )

    left, right = gradient_factors(a, b, grad_a, grad_b, first_order=first_order)
    if weight.dtype == torch.float32 and a.device == weight.device and serves_blocks(a, b):
        left, right = torch.cat([left, scaling * b], dim=1), torch.cat([right, a])
        return _native_sums(weight, left, right, over, element, chunk_elements)

    def importance(chunk: slice) -> torch.Tensor:
        estimate = left[chunk] @ right
        # addmm keeps W0 + s B A one temporary; the product then reuses the estimate's memory.
        estimate.mul_(torch.addmm(weight.rows(chunk), b[chunk], a, alpha=scaling))
        return estimate.square_() if element == "square" else estimate.abs_()

    return chunked_sums(weight, importance, over=over, chunk_elements=chunk_elements)


def _native_sums(
    weight: WeightRows,
    left_OR: torch.Tensor,
    right_RI: torch.Tensor,
    over: Axis,
    element: Element,
    chunk_elements: int | None,
) -> torch.Tensor:
    """The sums by the C library or by Triton, in float64 from chunk to chunk."""
    rows, columns = weight.shape
    sums = torch.zeros(rows if over == "rows" else columns, dtype=torch.float64, device=left_OR.device)
    for chunk in row_chunks(weight, chunk_elements):
        found = importance_sums(
            weight.rows(chunk),
            left_OR[chunk],
            right_RI,
            over_columns=over == "columns",
            square=element == "square",
        )
        if over == "rows":
            sums[chunk] = found
        else:
            sums += found
    return sums.to(weight.dtype)


def moving_average(past: GroupScores | None, new: GroupScores, momentum: float) -> GroupScores:
    """``momentum * past + (1 - momentum) * new`` of every group score; ``past`` None is zero."""
    if past is None:
        past = new.combine(new, lambda score, _: torch.zeros_like(score))
    return past.combine(new, lambda old, now: momentum * old + (1 - momentum) * now)


@CRITERIA.register("lora")
class LoraCriterion(Criterion):
    """LoRAPrune's criterion (arXiv 2305.18403 §3): a moving average of group scores over optimizer steps."""

    needs: ClassVar[Needs] = "adapters"
    config_type: ClassVar[type[CriterionConfig]] = LoraConfig

    def observe(self, model: nn.Module) -> None:
        """Take in one optimizer step: gradients averaged over accumulation, unscaled and unclipped.

        A step with a score that is not finite is left out and counted in ``skipped_steps``.

        Raises:
            CompressError: A decoder linear has no adapter, or its adapter no gradient.
        """
        with torch.no_grad():
            step = group_scores(model, self.arch, self._sums, normalize=self.config.normalize)
        if self._counted(step):
            self._scores = moving_average(self._scores, step, self.config.momentum)

    def _sums(self, module: nn.Module, spec: LinearSpec, name: str) -> torch.Tensor:
        factors = lora_factors(module, name)
        if factors is None:
            raise CompressError(
                f"The criterion 'lora' needs an unmerged adapter on {name}.",
                "Attach LoRA to every decoder linear, or choose another criterion.",
            )
        if factors.a.grad is None or factors.b.grad is None:
            raise CompressError(
                f"The adapter of {name} has no gradient.",
                "Run a backward pass with trainable adapters before scoring.",
            )
        return lora_group_sums(
            weight_rows(module, spec, name),
            factors.a,
            factors.b,
            factors.a.grad,
            factors.b.grad,
            scaling=factors.scaling,
            over=axis_of(spec),
            element=self.config.element,
            first_order=self.config.first_order,
            chunk_elements=self.config.chunk_elements,
        )
