"""Parts of a model whose weights are in memory only while they are used."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recomputed

from compress.errors import CompressError
from compress.model.checkpoint import Checkpoint
from compress.model.states import Room

_KEY = "streamed_unit"
"""Where a module keeps its unit; no submodule, no parameter."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Slot:
    """One tensor of a unit: where it belongs in the model and what it is called on disk."""

    place: weakref.ref[nn.Module]
    attribute: str
    stored: str
    dtype: torch.dtype
    shape: torch.Size

    @property
    def owner(self) -> nn.Module:
        """The module that has it."""
        return _alive(self.place)

    def put(self, tensor: Tensor, *, anew: bool = False) -> None:
        """Make ``tensor`` the parameter's data, which whoever holds the parameter sees, or the buffer.

        With ``anew`` it is the data of a parameter of its own, and the one before keeps what it has.
        """
        owner = self.owner
        if self.attribute not in owner._parameters:
            owner._buffers[self.attribute] = tensor
        elif anew:
            before = owner.get_parameter(self.attribute)
            owner._parameters[self.attribute] = nn.Parameter(tensor, requires_grad=before.requires_grad)
        else:
            owner.get_parameter(self.attribute).data = tensor


def _alive(place: weakref.ref[nn.Module]) -> nn.Module:
    module = place()
    if module is None:
        raise RuntimeError("a module was used after its model was dropped")
    return module


class Feeder:
    """Reads the tensors of units from a checkpoint; those of the unit that comes next ahead of time, in a thread.

    Args:
        checkpoint: Where they are.
        device: Where they go.
        ahead: Whether to read ahead, which takes the stored bytes of one more unit.
        room: Where hidden states of calibration text go that are too many; None: into memory.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: torch.device,
        *,
        ahead: bool = True,
        room: Room | None = None,
    ) -> None:
        self.device = device
        self.room = room
        self._units: list[weakref.ref[Unit]] = []
        self._checkpoint = checkpoint
        self._ahead = ahead
        self._last = -1
        self._coming: _Reading | None = None

    def add(self, unit: Unit) -> int:
        """Take ``unit`` in as the last one so far; its place in the order."""
        self._units.append(weakref.ref(unit))
        return len(self._units) - 1

    def take(self, unit: Unit) -> list[Tensor]:
        """The tensors of ``unit`` as they are stored, on the CPU."""
        coming, self._coming = self._coming, None
        if coming is not None:
            found = coming.result()
            if coming.index == unit.index:
                return found
            del found
        return _read(self._checkpoint, unit.stored)

    def expect_after(self, unit: Unit) -> None:
        """Begin to read what is used next if ``unit`` is followed as it was reached, up or down."""
        here, before, self._last = unit.index, self._last, unit.index
        place = here - 1 if here == before - 1 else here + 1
        following = self._units[place]() if 0 <= place < len(self._units) else None
        if self._ahead and self._coming is None and following is not None:
            self._coming = _Reading(following.index, self._checkpoint, following.stored)


def _read(checkpoint: Checkpoint, names: Sequence[str]) -> list[Tensor]:
    return [checkpoint.read(name) for name in names]


class _Reading:
    """The tensors of a unit that are being read; it does not know the unit, which would outlive its model."""

    def __init__(self, index: int, checkpoint: Checkpoint, names: Sequence[str]) -> None:
        self.index = index
        self._found: list[Tensor] = []
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(checkpoint, names), daemon=True)
        self._thread.start()

    def _run(self, checkpoint: Checkpoint, names: Sequence[str]) -> None:
        try:
            self._found = _read(checkpoint, names)
        except (CompressError, OSError, RuntimeError) as error:  # for whoever asks for the result
            self._error = error

    def result(self) -> list[Tensor]:
        self._thread.join()
        if self._error is not None:
            raise self._error
        found, self._found = self._found, []
        return found


class Unit:
    """A module with its tensors, which are there while it runs or while somebody holds it.

    Without them its parameters have their shapes and are NaN, so that no use of them goes unnoticed.

    Args:
        module: Runs with its weights from now on.
        slots: Its tensors.
        feeder: Gives them.
    """

    def __init__(self, module: nn.Module, slots: Sequence[Slot], feeder: Feeder) -> None:
        self.slots = tuple(slots)
        self.feeder = feeder
        self._module = weakref.ref(module)  # no cycle: what was read goes as soon as the model does
        self._holders = 0
        self._instead: dict[tuple[int, str], Callable[[], Tensor]] = {}
        module.__dict__ |= {_KEY: self, "forward": self._forward}
        self.index = feeder.add(self)
        self.stored = tuple(slot.stored for slot in slots)
        self._empty()

    def hold(self) -> None:
        """Load the tensors unless they are there."""
        self._holders += 1
        if self._holders > 1:
            return
        try:
            stored = self.feeder.take(self)
            stored.reverse()
            for slot in self.slots:  # one wider copy at a time beside what was read
                tensor = stored.pop()
                instead = self._instead.get((id(slot.owner), slot.attribute))
                slot.put((tensor if instead is None else instead()).to(self.feeder.device, slot.dtype))
                del tensor
        except BaseException:
            self.release()
            raise
        self.feeder.expect_after(self)

    def release(self) -> None:
        """Let the tensors go with their last holder."""
        self._holders -= 1
        if not self._holders:
            self._empty()

    def replace(self, owner: nn.Module, attribute: str, value: Callable[[], Tensor] | None) -> None:
        """From the next time on load ``value()`` for a tensor; None: what is stored, again."""
        if value is None:
            self._instead.pop((id(owner), attribute), None)
        else:
            self._instead[id(owner), attribute] = value

    def _empty(self) -> None:
        for slot in self.slots:
            nothing = torch.full(
                (1,),
                float("nan") if slot.dtype.is_floating_point else 0,
                dtype=slot.dtype,
                device=self.feeder.device,
            )
            # a graph that is about to be walked backwards may have saved the parameter itself
            slot.put(nothing.expand(slot.shape), anew=torch.is_grad_enabled())
            forget: Callable[[], None] | None = getattr(slot.owner, "forget_layout", None)
            if forget is not None:
                forget()

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled() or not _asks_for_gradients(args, kwargs):
            return self._run(*args, **kwargs)
        if not all(slot.dtype.is_floating_point for slot in self.slots):
            raise CompressError(
                "Gradients through quantized weights that are read layer by layer are not computed.",
                "Load the model whole: give more memory with --memory-limit.",
            )
        # What backward needs of the weights is loaded again then: a graph that kept them would keep all layers.
        return recomputed(self._run, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        self.hold()
        try:
            module = _alive(self._module)
            return type(module).forward(module, *args, **kwargs)
        finally:
            self.release()


def _asks_for_gradients(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    values = (*args, *kwargs.values())
    return any(isinstance(value, Tensor) and value.requires_grad for value in values)


def unit_of(module: nn.Module) -> Unit | None:
    """The unit that ``module`` is; None for one whose weights are always there."""
    found: Unit | None = module.__dict__.get(_KEY)
    return found


def enclosing_unit(model: nn.Module, name: str) -> Unit | None:
    """The unit that holds the weights of the module ``name``; None where they are always there."""
    while name:
        unit = unit_of(model.get_submodule(name))
        if unit is not None:
            return unit
        name = name.rpartition(".")[0]
    return None


@contextmanager
def resident(*modules: nn.Module) -> Iterator[None]:
    """Keep the weights of ``modules`` (decoder layers, an embedding) in memory while the block runs.

    Does nothing for modules of a model that is in memory whole.
    """
    with ExitStack() as stack:
        for module in modules:
            unit = unit_of(module)
            if unit is not None:
                unit.hold()
                stack.callback(unit.release)
        yield
