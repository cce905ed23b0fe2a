"""Pruning while several processes train: the first one scores and closes masks, the others take them over."""

from __future__ import annotations

from torch import Tensor, nn

from compress.adapters.ranks import Ranks
from compress.model.architecture import Architecture
from compress.prune.controller import PruneController, alive_layers, alive_tensors
from compress.prune.mask import GroupMasks


class MaskLeader:
    """The hook after a `PruneController` on the first rank: tells the others which groups it left.

    Args:
        controller: Has seen the step's gradients, which are those of all ranks.
        ranks: The processes.
    """

    def __init__(self, controller: PruneController, ranks: Ranks) -> None:
        self._controller, self._ranks = controller, ranks
        self._told = controller.layers

    def before_step(self, step: int) -> None:
        """Tell them, where that has changed."""
        layers = self._controller.layers
        changed = layers is not self._told
        self._ranks.value(changed)
        if changed:
            self._ranks.tensors(alive_tensors(layers))
            self._told = layers

    def skip_step(self, step: int) -> None:
        """The same: masks close on schedule, whether or not the step is taken."""
        self.before_step(step)


class MaskFollower:
    """The hook in the controller's place on the other ranks.

    Args:
        model: The model being trained.
        arch: Its architecture.
        ranks: The processes.
    """

    def __init__(self, model: nn.Module, arch: Architecture, ranks: Ranks) -> None:
        self._ranks, self._layers = ranks, arch.layers
        self._masks = GroupMasks(model, arch)

    def before_step(self, step: int) -> None:
        """Take over the first rank's masks."""
        if self._ranks.value(None):
            self._masks.update(alive_layers(self._ranks.tensors(None), self._layers))

    def skip_step(self, step: int) -> None:
        """The same for a step that is not taken."""
        self.before_step(step)

    def state_dict(self) -> dict[str, Tensor]:
        """Nothing: the first rank saves the controller's."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Put the masks of a controller's state on the model."""
        self._masks.update(alive_layers(state, self._layers))
