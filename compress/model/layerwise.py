"""Walk a decoder layer by layer with calibration activations, so that one layer at a time is looked at."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compress.errors import CompressError
from compress.model.architecture import Architecture, LinearSpec


class LayerWalk:
    """The hidden states of calibration windows in front of one decoder layer after the other.

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
        self.layers = [
            model.get_submodule(arch.layer_prefix.format(layer=i).rstrip(".")) for i in range(arch.layers)
        ]
        self._calls, self._hidden = _first_inputs(model, self.layers, ids_NS[:count].to(device).split(batch))

    def look(self, index: int) -> None:
        """Run layer ``index`` on the present states and forget what it gives; for the hooks' sake."""
        for states in self._hidden:
            run_layer(self.layers[index], states, self._calls[index])

    def advance(self, index: int) -> None:
        """Replace the states by what layer ``index`` makes of them."""
        layer, call = self.layers[index], self._calls[index]
        self._hidden = [run_layer(layer, states, call) for states in self._hidden]


@contextmanager
def gathered_grams(
    layer: nn.Module, columns: Mapping[LinearSpec, Tensor | None]
) -> Iterator[dict[LinearSpec, Tensor]]:
    """Sum ``X X_kept^T`` [C, K] of the inputs of a layer's linears over all runs of the layer.

    Products are taken in float32, sums in float64.

    Args:
        layer: A decoder layer.
        columns: Linear -> the columns to keep, int64 [K]; None keeps all.
    """
    grams: dict[LinearSpec, Tensor] = {}

    def hook(spec: LinearSpec) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def add(module: nn.Module, args: tuple[Any, ...]) -> None:
            x_TC = args[0].flatten(0, -2).float()
            kept = columns[spec]
            part = (x_TC.T @ (x_TC if kept is None else x_TC.index_select(1, kept))).double()
            grams[spec] = grams[spec] + part if spec in grams else part

        return add

    handles = [layer.get_submodule(spec.name).register_forward_pre_hook(hook(spec)) for spec in columns]
    try:
        yield grams
    finally:
        for handle in handles:
            handle.remove()


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
    model: nn.Module, layers: list[nn.Module], batches: tuple[Tensor, ...]
) -> tuple[list[dict[str, Any]], list[Tensor]]:
    """Keyword arguments of every layer's call, and the first layer's hidden states for each batch."""
    calls: list[dict[str, Any]] = [{} for _ in layers]
    hidden: list[Tensor] = []

    def remember(index: int) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls[index] = {name: value for name, value in kwargs.items() if name != "hidden_states"}
            if index == 0:
                hidden.append(args[0] if args else kwargs["hidden_states"])
                if len(hidden) > 1:
                    raise _FirstLayerReached

        return hook

    handles = [
        layer.register_forward_pre_hook(remember(index), with_kwargs=True)
        for index, layer in enumerate(layers)
    ]
    try:
        model(batches[0], use_cache=False)
        for ids in batches[1:]:
            with suppress(_FirstLayerReached):
                model(ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return calls, hidden


class _FirstLayerReached(Exception):
    """Ends a forward pass of which only the first layer's input is wanted."""
