"""What every pruning criterion is: scores of KV groups and MLP channels for every layer."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, get_args, get_type_hints

import torch

from compress.errors import CompressError, UsageError
from compress.importance import CRITERIA
from compress.model.architecture import Architecture

Needs = Literal["weights", "adapters", "gradients", "activations", "moments"]
"""What a criterion looks at; see :attr:`Criterion.needs`."""

Loss = Callable[[torch.nn.Module, torch.Tensor], torch.Tensor]
"""``loss(model, ids_BS)``: the summed next-token loss of one batch, a scalar."""

PARTS = ("kv_groups", "channels", "query_heads")
RISES = ("attention", "channels")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LayerScores:
    """Importance of the groups of one decoder layer; larger is more important.

    Attributes:
        kv_groups: float64 [kv_heads]; zeros where the attention cannot be pruned.
        channels: float64 [channels]; zeros where the MLP cannot be pruned.
        query_heads: float64 [heads], rows of q and columns of o only; ranks the heads inside a KV group.
    """

    kv_groups: torch.Tensor
    channels: torch.Tensor
    query_heads: torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LayerRise:
    """Predicted rise of the loss, in nats per token, when one layer keeps only so much; one scale for all layers.

    Attributes:
        attention: float64 [kv_heads + 1, queries per group + 1], for keeping k KV groups with q query heads each;
            with k = 0 or q = 0 the attention is gone.
        channels: float64 [channels + 1], for keeping c channels.
    """

    attention: torch.Tensor
    channels: torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class GroupScores:
    """Importance of every group of a model, on the CPU.

    Attributes:
        layers: Scores that rank groups.
        rises: What the ranked groups cost, where it was measured: one entry per layer.
    """

    layers: tuple[LayerScores, ...]
    rises: tuple[LayerRise, ...] | None = None

    @property
    def finite(self) -> bool:
        """Whether no score is infinite or not a number."""
        return all(bool(score.isfinite().all()) for score in self.to_tensors().values())

    def to_tensors(self) -> dict[str, torch.Tensor]:
        """``layers.{i}.kv_groups``, ``.channels`` and ``.query_heads``, for a safetensors file.

        Measured rises are ``rises.{i}.attention`` and ``.channels``.
        """
        found = {
            f"layers.{index}.{part}": getattr(layer, part)
            for index, layer in enumerate(self.layers)
            for part in PARTS
        }
        for index, rise in enumerate(self.rises or ()):
            found |= {f"rises.{index}.{part}": getattr(rise, part) for part in RISES}
        return found

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, torch.Tensor]) -> GroupScores:
        """The inverse of :meth:`to_tensors`; other names are ignored.

        Raises:
            CompressError: The scores of a layer are incomplete, as those of an earlier version are.
        """
        count = sum(name.startswith("layers.") and name.endswith(".kv_groups") for name in tensors)
        for name in (f"layers.{index}.{part}" for index in range(count) for part in PARTS):
            if name not in tensors:
                raise CompressError(f"The importance scores lack {name}.", "Score the model again.")
        return cls(
            layers=tuple(
                LayerScores(**{part: tensors[f"layers.{index}.{part}"] for part in PARTS})
                for index in range(count)
            ),
            rises=tuple(
                LayerRise(**{part: tensors[f"rises.{index}.{part}"] for part in RISES})
                for index in range(count)
            )
            if "rises.0.attention" in tensors
            else None,
        )

    def combine(
        self, other: GroupScores, rule: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    ) -> GroupScores:
        """``rule(mine, other's)`` of every vector of scores."""
        return GroupScores(
            layers=tuple(
                LayerScores(**{part: rule(getattr(mine, part), getattr(its, part)) for part in PARTS})
                for mine, its in zip(self.layers, other.layers, strict=True)
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

    needs: ClassVar[Needs]
    """What must be there when ``observe`` is called.

    weights: nothing else; observe once.
    adapters: gradients of a LoRA in training; observe once per optimizer step.
    gradients: gradients of the decoder linears' weights (:func:`compress.importance.collect.collect`).
    moments: calibration text, which the criterion reads by itself
        (:class:`compress.importance.obs.ObsCriterion`).
    activations: forward passes under ``watching`` (:class:`compress.importance.activations.ActivationCriterion`).
    """
    config_type: ClassVar[type[CriterionConfig]] = CriterionConfig

    def __init__(self, arch: Architecture, config: CriterionConfig | None = None) -> None:
        self.arch = arch
        self.config: Any = config if config is not None else self.config_type()
        self.steps = 0
        """Observations taken in."""
        self.skipped_steps = 0
        """Observations left out because a score was not finite."""
        self._scores: GroupScores | None = None

    @abstractmethod
    def observe(self, model: torch.nn.Module) -> None:
        """Take in ``model`` (plain or wrapped by PEFT), with what ``needs`` says."""

    def skip(self) -> None:
        """Count an observation that cannot be taken in: its gradients are not finite."""
        self.steps += 1
        self.skipped_steps += 1

    def scores(self) -> GroupScores:
        """The scores of everything observed so far.

        Raises:
            CompressError: Nothing (finite) was observed.
        """
        if self._scores is None:
            raise CompressError(
                f"There are no importance scores: {self.steps} steps were seen, "
                f"{self.skipped_steps} of them not finite.",
                "Score more steps, or check that the loss is finite (lower learning rate, other data).",
            )
        return self._scores

    def state_dict(self) -> dict[str, torch.Tensor]:
        """What a resumed run needs to go on exactly as if it had not been interrupted."""
        state = {"steps": torch.tensor(self.steps), "skipped_steps": torch.tensor(self.skipped_steps)}
        return state if self._scores is None else state | self._scores.to_tensors()

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self.steps = int(state["steps"])
        self.skipped_steps = int(state["skipped_steps"])
        self._scores = GroupScores.from_tensors(state) if "layers.0.kv_groups" in state else None

    def _counted(self, found: GroupScores) -> bool:
        """Count one observation; False, and counted as skipped, when its scores are not finite."""
        self.steps += 1
        self.skipped_steps += not found.finite
        return found.finite


_WANTED = {bool: "true or false", float: "a number", int: "a whole number"}


def criterion_config(name: str, *, seed: int = 0, **options: Any) -> CriterionConfig:
    """The config of criterion ``name`` with ``options``.

    Raises:
        UsageError: There is no such criterion, it has no such option, or a value is out of range.
    """
    kind: type[Criterion] = CRITERIA.get(name)
    known = sorted(field.name for field in fields(kind.config_type))
    for option in options:
        if option not in known:
            raise UsageError(
                f"The criterion {name!r} has no option {option!r}.", f"Choose among: {', '.join(known)}."
            )
    kinds = get_type_hints(kind.config_type)
    for option, value in options.items():
        _check_kind(option, value, kinds[option])
    return kind.config_type(seed=seed, **options)


def _check_kind(option: str, value: Any, hint: Any) -> None:
    """Refuse a value of another type, which a truth test or a comparison would take for something else."""
    accepted = {kind for kind in get_args(hint) or (hint,) if isinstance(kind, type)}
    if not accepted:  # a choice of words, whose config lists them
        return
    fits = type(value) in accepted or (float in accepted and type(value) is int)
    if fits and not (isinstance(value, float) and not math.isfinite(value)):
        return
    wanted = next(words for kind, words in _WANTED.items() if kind in accepted)
    raise UsageError(f"The option {option} is {value!r}.", f"Give {wanted}.")


def create_criterion(name: str, arch: Architecture, *, seed: int = 0, **options: Any) -> Criterion:
    """Build criterion ``name`` with ``options`` of its config class.

    Raises:
        UsageError: As :func:`criterion_config`.
    """
    kind: type[Criterion] = CRITERIA.get(name)
    return kind(arch, criterion_config(name, seed=seed, **options))
