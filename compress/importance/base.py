"""What every pruning criterion is: scores of KV groups and MLP channels for every layer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch

from compress.errors import CompressError, UsageError
from compress.importance import CRITERIA
from compress.model.architecture import Architecture


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LayerScores:
    """Importance of the groups of one decoder layer; larger is more important.

    Attributes:
        kv_groups: float64 [kv_heads]; zeros where the attention cannot be pruned.
        channels: float64 [channels]; zeros where the MLP cannot be pruned.
    """

    kv_groups: torch.Tensor
    channels: torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class GroupScores:
    """Importance of every group of a model, on the CPU."""

    layers: tuple[LayerScores, ...]

    @property
    def finite(self) -> bool:
        """Whether no score is infinite or not a number."""
        return all(
            bool(part.isfinite().all()) for layer in self.layers for part in (layer.kv_groups, layer.channels)
        )

    def to_tensors(self) -> dict[str, torch.Tensor]:
        """``layers.{i}.kv_groups`` and ``layers.{i}.channels``, for a safetensors file."""
        tensors = {}
        for index, layer in enumerate(self.layers):
            tensors[f"layers.{index}.kv_groups"] = layer.kv_groups
            tensors[f"layers.{index}.channels"] = layer.channels
        return tensors

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, torch.Tensor]) -> GroupScores:
        """The inverse of :meth:`to_tensors`; other names are ignored."""
        count = sum(name.startswith("layers.") and name.endswith(".kv_groups") for name in tensors)
        return cls(
            layers=tuple(
                LayerScores(
                    kv_groups=tensors[f"layers.{index}.kv_groups"],
                    channels=tensors[f"layers.{index}.channels"],
                )
                for index in range(count)
            )
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class CriterionConfig:
    """Settings every criterion takes.

    Attributes:
        seed: Seed of whatever the criterion draws.
        normalize: Divide each linear's group vector by its L2 norm before adding the linears of a group,
            so that q, k, v, o (and gate, up, down) contribute on one scale.
        chunk_elements: Weight elements looked at together, which bounds the memory; None: by device.
    """

    seed: int = 0
    normalize: bool = True
    chunk_elements: int | None = None

    def __post_init__(self) -> None:
        if self.chunk_elements is not None and self.chunk_elements < 1:
            raise UsageError(f"chunk_elements is {self.chunk_elements}.", "Give at least 1.")


class Criterion(ABC):
    """A way to score groups. ``observe`` takes in the model's present state, ``scores`` reads the result.

    Args:
        arch: Architecture of the model that will be observed.
        config: Settings; ``config_type`` says of which class.
    """

    requires_training: ClassVar[bool]
    """True: observe once per optimizer step, with gradients. False: observe once, no gradients needed."""
    config_type: ClassVar[type[CriterionConfig]] = CriterionConfig

    def __init__(self, arch: Architecture, config: CriterionConfig | None = None) -> None:
        self.arch = arch
        self.config: Any = config if config is not None else self.config_type()
        self.steps = 0
        """Observations taken in."""
        self.skipped_steps = 0
        """Observations left out because a score was not finite."""

    @abstractmethod
    def observe(self, model: torch.nn.Module) -> None:
        """Take in ``model`` (plain or wrapped by PEFT), with its gradients when ``requires_training``."""

    @abstractmethod
    def scores(self) -> GroupScores:
        """The scores of everything observed so far.

        Raises:
            CompressError: Nothing (finite) was observed.
        """

    def state_dict(self) -> dict[str, torch.Tensor]:
        """What a resumed run needs to go on exactly as if it had not been interrupted."""
        return {"steps": torch.tensor(self.steps), "skipped_steps": torch.tensor(self.skipped_steps)}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self.steps = int(state["steps"])
        self.skipped_steps = int(state["skipped_steps"])

    def _nothing_observed(self) -> CompressError:
        return CompressError(
            f"There are no importance scores: {self.steps} steps were seen, "
            f"{self.skipped_steps} of them not finite.",
            "Score more steps, or check that the loss is finite (lower learning rate, other data).",
        )


def create_criterion(name: str, arch: Architecture, *, seed: int = 0, **options: Any) -> Criterion:
    """Build criterion ``name`` with ``options`` of its config class.

    Raises:
        UsageError: There is no such criterion, or it has no such option.
    """
    kind: type[Criterion] = CRITERIA.get(name)
    known = sorted(field.name for field in fields(kind.config_type))
    for option in options:
        if option not in known:
            raise UsageError(
                f"The criterion {name!r} has no option {option!r}.", f"Choose among: {', '.join(known)}."
            )
    return kind(arch, kind.config_type(seed=seed, **options))
