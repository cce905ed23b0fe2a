"""Walk a decoder layer by layer with calibration activations, so that one layer at a time is looked at."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from compress.errors import CompressError
from compress.model.architecture import Architecture, LinearSpec
from compress.model.resident import resident, unit_of
from compress.model.states import HiddenStates

_STRIPE = 384
"""Rows of a Gram matrix that are computed at once, from the diagonal on."""


class LayerWalk:
    """The hidden states of calibration windows in front of one decoder layer after the other.

    Of a streamed model one layer at a time is in memory, and hidden states beyond its room are in a file.

    Args:
        model: A causal language model; it is run, never changed.
        arch: Its architecture.
        ids_NS: Calibration tokens, int64 [N, S].
        batch: Windows per forward pass; an incomplete last batch is left out.

    Raises:
        CompressError: There are fewer windows than one batch.
    """

    def __init__(self, model: nn.Module, arch: Architecture, ids_NS: Tensor, *, batch: int = 4) -> None:
        count = len(ids_NS) // batch * batch
        if count == 0:
            raise CompressError(
                f"Calibration got {len(ids_NS)} windows, fewer than one batch of {batch}.",
                "Give a longer text.",
            )
        device = next(model.parameters()).device
        paths = [arch.layer_prefix.format(layer=i).rstrip(".") for i in range(arch.layers)]
        self.layers = [model.get_submodule(path) for path in paths]
        embedding = model.get_submodule(arch.embedding_module)
        with resident(embedding):  # once for all batches
            self._calls, first = _first_inputs(model, paths, ids_NS[:count].to(device).split(batch))
        unit = unit_of(self.layers[0])
        self._hidden = HiddenStates(first, None if unit is None else unit.feeder.room)

    def look(self, index: int) -> None:
        """Run layer ``index`` on the present states and forget what it gives; for the hooks' sake.

        Of each run only as much is done as the hooks of :func:`gathered_grams` ask for.
        """
        layer = self.layers[index]
        with resident(layer):
            for states in self._hidden:
                with suppress(_EnoughSeen):
                    run_layer(layer, states, self._calls[index])

    def advance(self, index: int) -> None:
        """Replace the states by what layer ``index`` makes of them."""
        layer, call = self.layers[index], self._calls[index]
        with resident(layer):
            for at in range(len(self._hidden)):
                self._hidden[at] = run_layer(layer, self._hidden[at], call)


@contextmanager
def gathered_grams(
    layer: nn.Module, columns: Mapping[LinearSpec, Tensor | None], *, only: bool = False
) -> Iterator[dict[LinearSpec, Tensor]]:
    """Sum ``X X_kept^T`` [C, K] of the inputs of a layer's linears over all runs of the layer.

    Products are taken in float32, sums in float64. What is symmetric is complete when the block ends.

    Args:
        layer: A decoder layer.
        columns: Linear -> the columns to keep, int64 [K]; None keeps all.
        only: End each run (of :meth:`LayerWalk.look`) as soon as every linear of ``columns`` has been fed.
    """
    grams: dict[LinearSpec, Tensor] = {}
    fed: set[LinearSpec] = set()

    def hook(spec: LinearSpec) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def add(module: nn.Module, args: tuple[Any, ...]) -> None:
            x_TC = args[0].flatten(0, -2).float()
            kept = columns[spec]
            if spec not in grams:
                shape = (x_TC.shape[1], x_TC.shape[1] if kept is None else len(kept))
                grams[spec] = torch.zeros(shape, dtype=torch.float64, device=x_TC.device)
            if kept is None:
                _add_upper_gram(x_TC, grams[spec])
            else:
                grams[spec] += x_TC.T @ x_TC.index_select(1, kept)
            fed.add(spec)
            if only and len(fed) == len(columns):
                fed.clear()
                raise _EnoughSeen

        return add

    handles = [layer.get_submodule(spec.name).register_forward_pre_hook(hook(spec)) for spec in columns]
    try:
        yield grams
    finally:
        for handle in handles:
            handle.remove()
        for spec, gram in grams.items():
            if columns[spec] is None:
                _mirror_upper(gram)


def _add_upper_gram(x_TC: Tensor, gram_CC: Tensor) -> None:
    """Add ``X^T X`` to the upper triangle; of the lower one, to some more."""
    for start in range(0, x_TC.shape[1], _STRIPE):
        stop = start + _STRIPE
        gram_CC[start:stop, start:] += x_TC[:, start:stop].T @ x_TC[:, start:]


def _mirror_upper(gram_CC: Tensor) -> None:
    """Copy the upper triangle onto the lower one, a stripe at a time: without a second matrix."""
    for start in range(0, len(gram_CC), _STRIPE):
        stop = start + _STRIPE
        square = gram_CC[start:stop, start:stop]
        square.copy_(square.triu() + square.triu(1).T)
        gram_CC[stop:, start:stop] = gram_CC[start:stop, stop:].T


@dataclass(slots=True)
class InputSum:
    """Sum of a linear's inputs over tokens, float64 [C], and how many they were."""

    total: Tensor
    tokens: int


@contextmanager
def gathered_sums(layer: nn.Module, specs: Sequence[LinearSpec]) -> Iterator[dict[LinearSpec, InputSum]]:
    """Sum the inputs of a layer's linears over all runs of the layer."""
    sums: dict[LinearSpec, InputSum] = {}

    def hook(spec: LinearSpec) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def add(module: nn.Module, args: tuple[Any, ...]) -> None:
            x_TC = args[0].flatten(0, -2)
            part = x_TC.sum(dim=0, dtype=torch.float64)
            if spec in sums:
                sums[spec] = InputSum(sums[spec].total + part, sums[spec].tokens + len(x_TC))
            else:
                sums[spec] = InputSum(part, len(x_TC))

        return add

    handles = [layer.get_submodule(spec.name).register_forward_pre_hook(hook(spec)) for spec in specs]
    try:
        yield sums
    finally:
        for handle in handles:
            handle.remove()


def run_layer(layer: nn.Module, hidden: Tensor, call: Mapping[str, Any]) -> Tensor:
    """One decoder layer's output for ``hidden`` [B, S, H], with the keyword arguments its model gives it."""
    result = layer(hidden, **call)
    output: Tensor = result[0] if isinstance(result, tuple) else result
    return output


def _first_inputs(
    model: nn.Module, paths: list[str], batches: tuple[Tensor, ...]
) -> tuple[list[dict[str, Any]], list[Tensor]]:
    """Keyword arguments of every layer's call, and the first layer's hidden states for each batch."""
    notes = _Notes(calls=[{} for _ in paths])
    layers = [model.get_submodule(path) for path in paths]
    try:
        for index, layer in enumerate(layers):
            _put(model, paths[index], _StandIn(layer, index, notes))
        for ids in batches:
            with suppress(_EnoughSeen):
                model(ids, use_cache=False)
    finally:
        for path, layer in zip(paths, layers, strict=True):
            _put(model, path, layer)
    return notes.calls, notes.hidden


@dataclass(slots=True)
class _Notes:
    """What stand-ins have seen: keyword arguments by layer, first hidden states by batch, the first layer's output."""

    calls: list[dict[str, Any]]
    hidden: list[Tensor] = field(default_factory=list)
    output: Any = None


class _StandIn(nn.Module):
    """Takes a layer's place and notes how it is called.

    Only the first layer computes, once; what it gives passes all the others, and the last one ends the run.
    """

    def __init__(self, layer: nn.Module, index: int, notes: _Notes) -> None:
        super().__init__()
        self.__dict__.update(layer=layer, index=index, notes=notes)  # no submodule: its weights have a place

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["layer"], name)  # models ask their layers for the kind of attention

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        notes: _Notes = self.notes
        notes.calls[self.index] = {name: value for name, value in kwargs.items() if name != "hidden_states"}
        if self.index == 0:
            notes.hidden.append(args[0] if args else kwargs["hidden_states"])
        if self.index == len(notes.calls) - 1 or len(notes.hidden) > 1:
            raise _EnoughSeen
        if self.index == 0:
            notes.output = self.layer(*args, **kwargs)
        return notes.output


def _put(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


class _EnoughSeen(Exception):
    """Ends a forward pass of which no more is wanted."""
