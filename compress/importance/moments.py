"""Second moments that curvature needs: of the inputs of o and down, and of the loss gradient at their outputs.

Shapes: N windows, S tokens, T tokens of a batch, C input columns, O outputs, K rows of a root.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from compress.errors import CompressError, UsageError
from compress.importance.base import Criterion, Loss, Needs
from compress.importance.output_gradients import Place, backward_passes
from compress.model.architecture import Architecture, LinearSpec
from compress.progress import Progress

OUTPUTS = ("o", "down")
"""Roles whose outputs are added to the residual stream and whose input columns belong to groups."""
SKETCH_ROWS = 1024
"""Wider outputs are sketched to this many rows; narrower ones are kept exactly."""


class MomentCriterion(Criterion):
    """A criterion that reads calibration text by itself: forward and backward passes, then layer by layer."""

    needs: ClassVar[Needs] = "moments"

    def observe(self, model: nn.Module) -> None:
        """Refuse: there is nothing to see without text.

        Raises:
            UsageError: Always.
        """
        raise UsageError("This criterion needs calibration text.", "Call measure() or collect().")

    @abstractmethod
    def measure(
        self,
        model: nn.Module,
        ids_NS: Tensor,
        *,
        loss: Loss,
        batch: int,
        recompute: bool = False,
        progress: Progress | None = None,
    ) -> None:
        """Score the model's groups on calibration text; a later call replaces the scores.

        Args:
            model: A causal language model, plain or PEFT, in evaluation mode.
            ids_NS: Calibration tokens, int64 [N, S].
            loss: Summed next-token loss of a batch.
            batch: Windows per pass.
            recompute: Run layers again in backward passes instead of keeping their activations.
            progress: Called after every batch of the backward passes and after every layer.

        Raises:
            UsageError: Layers are to be run again, and cannot.
            CompressError: There are fewer windows than one batch.
        """


def require_finite(statistic: Tensor, of: str) -> None:
    """Refuse statistics of calibration that no equation can be solved with.

    Args:
        statistic: Of any shape.
        of: What they are of, at the head of the sentence: "The inputs of model.layers.0.mlp.down_proj".

    Raises:
        CompressError: A value is not finite.
    """
    if not bool(statistic.isfinite().all()):
        raise CompressError(
            f"{of} are not finite on the calibration text.",
            "Give --dtype float32; if that does not help, check the model with compress verify.",
        )


class OutputGradients:
    """Roots of ``S = mean of g g^T`` for the gradient g of the summed loss at each output of o and down.

    Only activations carry gradients: no weight gets one. The mean is over tokens.

    Args:
        arch: Architecture of the model.
        seed: Seed of the sketch of wide outputs.
    """

    def __init__(self, arch: Architecture, *, seed: int = 0) -> None:
        self._arch = arch
        self._sums: dict[Place, Tensor] = {}
        self._tokens = 0
        self._generator = torch.Generator().manual_seed(seed)

    def gather(
        self,
        model: nn.Module,
        batches: Sequence[Tensor],
        loss: Loss,
        progress: Progress | None = None,
    ) -> None:
        """Run forward and backward over ``batches`` of tokens [B, S]; ``loss`` is the summed next-token loss."""
        self._tokens += backward_passes(
            model, self._arch, OUTPUTS, batches, loss, self._add, progress=progress
        )

    def state_dict(self) -> dict[str, Tensor]:
        """Everything gathered so far, on the CPU."""
        sums = {f"{layer}.{spec.name}": total.cpu() for (layer, spec), total in self._sums.items()}
        return sums | {"tokens": torch.tensor(self._tokens)}

    def load_state_dict(self, state: Mapping[str, Tensor], device: torch.device) -> None:
        """Take up what :meth:`state_dict` returned, to read roots from it on ``device``."""
        self._tokens = int(state["tokens"])
        self._sums = {
            (layer, spec): state[f"{layer}.{spec.name}"].to(device)
            for layer in range(self._arch.layers)
            for spec in self._arch.linears_at(layer)
            if f"{layer}.{spec.name}" in state
        }

    def root(self, layer: int, spec: LinearSpec) -> Tensor:
        """``root^T root = S``, float64 [K, O]; K is at most O.

        Raises:
            CompressError: A gradient was not finite.
        """
        name = self._arch.module_name(layer, spec)
        require_finite(self._sums[layer, spec], f"The gradients at the output of {name}")
        total = self._sums[layer, spec].double() / self._tokens
        if self._arch.hidden > SKETCH_ROWS:
            scale: float = self._tokens**0.5  # a sketch holds rows, not their products
            return total * scale
        values, vectors = torch.linalg.eigh(total)
        root: Tensor = (vectors * values.clamp(min=0).sqrt()).T
        return root

    def _add(self, place: Place, gradient_TO: Tensor) -> None:
        if self._arch.hidden > SKETCH_ROWS:
            draw = torch.randint(0, 2, (SKETCH_ROWS, len(gradient_TO)), generator=self._generator)
            signs = (2 * draw - 1).to(gradient_TO) / SKETCH_ROWS**0.5
            part = signs @ gradient_TO
        else:
            part = gradient_TO.T @ gradient_TO
        self._sums[place] = self._sums[place] + part if place in self._sums else part
