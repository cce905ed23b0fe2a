"""Pruning while training: observe each step, tighten the masks on schedule, end at the exact target."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import TracebackType

import torch
from torch import nn

from compress.importance.base import Criterion, GroupScores
from compress.model.architecture import Architecture
from compress.prune.mask import GroupMasks
from compress.prune.schedule import PruningSchedule
from compress.prune.select import select
from compress.prune.shape import ShapePlan
from compress.structure import (
    LayerShape,
    LayerStructure,
    StructureMap,
    full_layer,
    full_shape,
    kept_heads,
    structure_map,
)


class PruneController:
    """A training hook that prunes (LoRAPrune, arXiv 2305.18403, algorithm 1).

    A pruned unit stays pruned, whatever its moving average does later. Training may go on after the last
    step of the schedule; the masks then stay as they are.

    Args:
        model: The model being trained; masks are put on its o and down projections at once.
        arch: Its architecture.
        criterion: Scores groups. One that needs adapters is observed at every step. One that needs only weights is
            observed once, here, unless it was before. One that needs gradients or activations has been observed by
            the caller.
        schedule: When to prune.
        shape: The target, or a function that chooses it from the scores when the first mask is due.
        one_shot: Only score during training; prune everything at the end.
    """

    def __init__(
        self,
        model: nn.Module,
        arch: Architecture,
        criterion: Criterion,
        schedule: PruningSchedule,
        shape: ShapePlan | Callable[[GroupScores], ShapePlan],
        *,
        one_shot: bool = False,
    ) -> None:
        self._model = model
        self._arch = arch
        self._criterion = criterion
        self._schedule = schedule
        self._shape = shape
        self._chosen: tuple[ShapePlan, GroupScores] | None = None
        self._one_shot = one_shot
        self._masks = GroupMasks(model, arch)
        self._alive: tuple[LayerStructure, ...] = (full_layer(arch),) * arch.layers
        if criterion.needs == "weights" and criterion.steps == 0:
            criterion.observe(model)

    @property
    def plan(self) -> ShapePlan:
        """The target shape; chosen now when it was left to the scores.

        Raises:
            CompressError: There are no finite scores to choose by.
        """
        if isinstance(self._shape, ShapePlan):
            return self._shape
        if self._chosen is None:
            scores = self._criterion.scores()
            self._chosen = self._shape(scores), scores
        return self._chosen[0]

    @property
    def layers(self) -> tuple[LayerStructure, ...]:
        """What the present masks keep."""
        return self._alive

    @property
    def skipped_steps(self) -> int:
        """Steps left out of the scores because they were not finite."""
        return self._criterion.skipped_steps

    def before_step(self, step: int) -> None:
        """Observe the gradients of optimizer step ``step`` (from 0) and tighten the masks when that is due.

        Call after the backward passes of a step, with gradients averaged over accumulation, unscaled,
        before clipping.

        Raises:
            CompressError: A mask is due, and a criterion that is observed but once has no finite scores.
        """
        if self._observes(step):
            self._criterion.observe(self._model)
        self._close(step)

    def skip_step(self, step: int) -> None:
        """Count a step whose gradients are not finite, which is not taken; tighten the masks when that is due.

        Raises:
            CompressError: As :meth:`before_step`.
        """
        if self._observes(step):
            self._criterion.skip()
        self._close(step)

    def _observes(self, step: int) -> bool:
        return self._criterion.needs == "adapters" and step < self._schedule.total_steps

    def _close(self, step: int) -> None:
        progress = self._schedule.progress(step)
        if self._one_shot or progress == 0 or not self._schedule.due(step):
            return
        blind = self._criterion.steps == self._criterion.skipped_steps
        if self._criterion.needs == "adapters" and blind:
            return  # nothing finite yet; a later mask catches up, and structure() reports if none ever comes
        full = full_shape(self._arch)
        self._prune_to([self._schedule.shape(step, full, target) for target in self.plan.shapes])

    def structure(self, *, base_fingerprint: str) -> StructureMap:
        """The final structure: exactly the target shapes, also when training ended early or was one-shot.

        Raises:
            CompressError: There are no finite scores to choose by.
        """
        self._prune_to(self.plan.shapes)
        return structure_map(self._arch, self._alive, base_fingerprint=base_fingerprint)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Scores, masks and target, for a run that is resumed."""
        state = {f"criterion.{name}": value for name, value in self._criterion.state_dict().items()}
        state |= alive_tensors(self._alive)
        if self._chosen is not None:  # from the same scores the function chooses the same shape again
            state.update({f"chosen.{name}": value for name, value in self._chosen[1].to_tensors().items()})
        return state

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Restore what :meth:`state_dict` returned; the masks are put back on the model."""
        self._criterion.load_state_dict(_under("criterion.", state))
        chosen = _under("chosen.", state)
        if chosen and not isinstance(self._shape, ShapePlan):
            scores = GroupScores.from_tensors(chosen)
            self._chosen = self._shape(scores), scores
        self._alive = alive_layers(state, self._arch.layers)
        self._masks.update(self._alive)

    def close(self) -> None:
        """Take the masks off the model."""
        self._masks.remove()

    def __enter__(self) -> PruneController:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _prune_to(self, shapes: Sequence[LayerShape]) -> None:
        if any(
            _asks_less(self._arch, shape, layer) for shape, layer in zip(shapes, self._alive, strict=True)
        ):
            self._alive = select(self._arch, self._criterion.scores(), shapes, alive=self._alive)
            self._masks.update(self._alive)


def alive_tensors(layers: Sequence[LayerStructure]) -> dict[str, torch.Tensor]:
    """What masks keep, as tensors ``alive.{layer}.kv_groups``, ``channels`` and ``query_heads``."""
    state = {}
    for index, layer in enumerate(layers):
        state[f"alive.{index}.kv_groups"] = layer.kv_groups
        state[f"alive.{index}.channels"] = layer.channels
        if layer.query_heads is not None:
            state[f"alive.{index}.query_heads"] = layer.query_heads
    return state


def alive_layers(state: Mapping[str, torch.Tensor], layers: int) -> tuple[LayerStructure, ...]:
    """What :func:`alive_tensors` was given, of so many layers."""
    return tuple(
        LayerStructure(
            kv_groups=state[f"alive.{index}.kv_groups"],
            channels=state[f"alive.{index}.channels"],
            query_heads=state.get(f"alive.{index}.query_heads"),
        )
        for index in range(layers)
    )


def _asks_less(arch: Architecture, shape: LayerShape, layer: LayerStructure) -> bool:
    """Whether ``shape`` keeps less than ``layer`` has."""
    groups = len(layer.kv_groups)
    return (
        shape.kv_heads < groups
        or shape.queries * groups < len(kept_heads(arch, layer))
        or shape.channels < len(layer.channels)
    )


def _under(prefix: str, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
