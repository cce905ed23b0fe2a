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
from compress.importance.base import Criterion, CriterionConfig, GroupScores, LayerScores
from compress.importance.modules import base_weight, lora_factors
from compress.importance.reduce import group_scores, row_chunks
from compress.model.architecture import LinearSpec
from compress.structure import ROW_ROLES

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


def gradient_estimate(
    a_RI: torch.Tensor,
    b_OR: torch.Tensor,
    grad_a_RI: torch.Tensor,
    grad_b_OR: torch.Tensor,
    *,
    first_order: bool = False,
) -> torch.Tensor:
    """LoRAPrune's estimate of the gradient of a frozen weight (arXiv 2305.18403 §3.2), [O, I].

    One imaginary SGD step of size 1 on A and B changes BA by ``G = gB A + B gA - gB gA``. The LoRA scale s
    enters through the gradients (``gB = s G* A^T``, ``gA = s B^T G*`` for the true gradient G*), so without
    the last term ``G = s (G* A^T A + B B^T G*)``. The weight ``W0 + s B A`` itself would move by ``s G``: a
    constant factor of a linear, which the normalisation per linear removes; the estimate is used as the
    paper writes it.

    Args:
        a_RI: LoRA A.
        b_OR: LoRA B, or any rows of it (then the same rows of ``grad_b_OR``).
        grad_a_RI: Gradient of A, unscaled.
        grad_b_OR: Gradient of B, unscaled.
        first_order: Leave out ``gB gA``.
    """
    inner_RI = a_RI if first_order else a_RI - grad_a_RI
    return torch.cat([grad_b_OR, b_OR], dim=1) @ torch.cat([inner_RI, grad_a_RI], dim=0)


def lora_group_sums(
    weight_OI: torch.Tensor,
    a_RI: torch.Tensor,
    b_OR: torch.Tensor,
    grad_a_RI: torch.Tensor,
    grad_b_OR: torch.Tensor,
    *,
    scaling: float,
    over: Literal["rows", "columns"],
    element: Element = "square",
    first_order: bool = False,
    chunk_elements: int | None = None,
) -> torch.Tensor:
    """Importance of a linear's elements, summed over each row [O] or each column [I] (LoRAPrune §3.2).

    The element importance is ``(G * W)^2`` or ``|G * W|`` with ``G`` of :func:`gradient_estimate` and the
    merged weight ``W = W0 + scaling * B A``. Neither G nor W nor the importance exists for more than one
    chunk of rows.

    Args:
        weight_OI: Frozen weight W0, any float dtype; computed in float32, or float64 when it is float64.
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
    dtype = torch.float64 if weight_OI.dtype == torch.float64 else torch.float32
    a, b, grad_a, grad_b = (
        tensor.detach().to(weight_OI.device, dtype) for tensor in (a_RI, b_OR, grad_a_RI, grad_b_OR)
    )
    rows, columns = weight_OI.shape
    sums = torch.zeros(rows if over == "rows" else columns, dtype=dtype, device=weight_OI.device)
    for chunk in row_chunks(weight_OI, chunk_elements):
        estimate = gradient_estimate(a, b[chunk], grad_a, grad_b[chunk], first_order=first_order)
        # addmm keeps W0 + s B A one temporary; the product then reuses the estimate's memory.
        estimate.mul_(torch.addmm(weight_OI[chunk].to(dtype), b[chunk], a, alpha=scaling))
        estimate = estimate.square_() if element == "square" else estimate.abs_()
        if over == "rows":
            sums[chunk] = estimate.sum(dim=1)
        else:
            sums += estimate.sum(dim=0)
    return sums


def moving_average(past: GroupScores | None, new: GroupScores, momentum: float) -> GroupScores:
    """``momentum * past + (1 - momentum) * new`` of every group score; ``past`` None is zero."""
    if past is None:
        past = GroupScores(
            layers=tuple(
                LayerScores(
                    kv_groups=torch.zeros_like(layer.kv_groups), channels=torch.zeros_like(layer.channels)
                )
                for layer in new.layers
            )
        )
    return GroupScores(
        layers=tuple(
            LayerScores(
                kv_groups=momentum * old.kv_groups + (1 - momentum) * now.kv_groups,
                channels=momentum * old.channels + (1 - momentum) * now.channels,
            )
            for old, now in zip(past.layers, new.layers, strict=True)
        )
    )


@CRITERIA.register("lora")
class LoraCriterion(Criterion):
    """LoRAPrune's criterion (arXiv 2305.18403 §3): a moving average of group scores over optimizer steps."""

    requires_training: ClassVar[bool] = True
    config_type: ClassVar[type[CriterionConfig]] = LoraConfig
    _average: GroupScores | None = None

    def observe(self, model: nn.Module) -> None:
        """Take in one optimizer step: gradients averaged over accumulation, unscaled and unclipped.

        A step with a score that is not finite is left out and counted in ``skipped_steps``.

        Raises:
            CompressError: A decoder linear has no adapter, or its adapter no gradient.
        """
        with torch.no_grad():
            step = group_scores(model, self.arch, self._sums, normalize=self.config.normalize)
        self.steps += 1
        if step.finite:
            self._average = moving_average(self._average, step, self.config.momentum)
        else:
            self.skipped_steps += 1

    def scores(self) -> GroupScores:
        """The moving average so far.

        Raises:
            CompressError: No finite step was observed.
        """
        if self._average is None:
            raise self._nothing_observed()
        return self._average

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The moving average and the counters."""
        state = super().state_dict()
        if self._average is not None:
            state.update(self._average.to_tensors())
        return state

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Restore what :meth:`state_dict` returned."""
        super().load_state_dict(state)
        self._average = GroupScores.from_tensors(state) if "layers.0.kv_groups" in state else None

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
            base_weight(module, spec),
            factors.a,
            factors.b,
            factors.a.grad,
            factors.b.grad,
            scaling=factors.scaling,
            over="rows" if spec.role in ROW_ROLES else "columns",
            element=self.config.element,
            first_order=self.config.first_order,
            chunk_elements=self.config.chunk_elements,
        )
