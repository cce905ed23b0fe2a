"""Repair after pruning: refit o and down of every layer to what they did with all their inputs.

The optimal-brain-surgeon step on whole groups, solved as ridge regression on real activations. Inputs and targets
both come from the full model: refitting on the drifted inputs of already pruned layers was measured to be far
worse (the regression shrinks its answer to allow for the noise, layer after layer). No gradients, no labels, one
forward pass, one layer's statistics in memory at a time.

Shapes: N windows, S tokens, T tokens of a batch, O output rows, C input columns, K kept columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from compress.errors import CompressError, UsageError
from compress.model.architecture import Architecture, LinearSpec
from compress.progress import Progress
from compress.structure import StructureMap, kept_columns

OUTPUTS = ("o", "down")
"""Roles whose input columns pruning removes."""


def refit(weight_OC: Tensor, gram_CK: Tensor, kept_K: Tensor, damping: float) -> Tensor:
    """The weight V [O, K] that minimises ``||W X - V X_kept||^2 + ridge ||V - W_kept||^2``.

    Args:
        weight_OC: W.
        gram_CK: Columns ``kept`` of ``X X^T``.
        kept_K: Kept columns, int64.
        damping: Ridge as a share of the mean diagonal of ``X_kept X_kept^T``; above zero.

    Returns:
        V, float64.
    """
    weight, gram = weight_OC.double(), gram_CK.double()
    inner_KK = gram[kept_K]
    ridge = damping * inner_KK.diagonal().mean()
    start_OK = weight[:, kept_K]
    if not ridge > 0:  # the kept inputs are all zero
        return start_OK
    system = inner_KK + ridge * torch.eye(len(kept_K), dtype=torch.float64, device=gram.device)
    right_OK = weight @ gram + ridge * start_OK
    return torch.cholesky_solve(right_OK.T, torch.linalg.cholesky(system)).T


@torch.no_grad()
def compensate(
    model: nn.Module,
    arch: Architecture,
    structure: StructureMap,
    ids_NS: Tensor,
    *,
    batch: int = 4,
    damping: float = 0.01,
    progress: Progress | None = None,
) -> dict[str, Tensor]:
    """New weights of o and down for the pruned model.

    Args:
        model: The full model; left as it is.
        arch: Its architecture.
        structure: What is kept.
        ids_NS: Calibration tokens, int64 [N, S]; some 16 per kept column or more.
        batch: Windows per forward pass; an incomplete last batch is left out.
        damping: See :func:`refit`.
        progress: Called after every layer.

    Returns:
        Module name -> weight [out, in] in float32 at full size, zero in the removed columns; only for matrices that
        lose columns.

    Raises:
        UsageError: The damping is not above zero.
        CompressError: There are fewer windows than one batch.
    """
    if not damping > 0:
        raise UsageError(f"The damping is {damping}.", "Give a number above zero, such as 0.01.")
    count = len(ids_NS) // batch * batch
    if count == 0:
        raise CompressError(
            f"Compensation got {len(ids_NS)} windows, fewer than one batch of {batch}.", "Give a longer text."
        )
    device = next(model.parameters()).device
    layers = [model.get_submodule(arch.layer_prefix.format(layer=i).rstrip(".")) for i in range(arch.layers)]
    calls, hidden = _first_inputs(model, layers, ids_NS[:count].to(device).split(batch))
    found: dict[str, Tensor] = {}
    for index, layer in enumerate(layers):
        kept = {
            spec: columns.to(device)
            for spec in arch.linears
            if spec.role in OUTPUTS
            and (columns := kept_columns(arch, spec, structure.layers[index])) is not None
        }
        with _gathering(layer, kept) as grams:
            hidden = [_run(layer, states, calls[index]) for states in hidden]
        for spec, columns in kept.items():
            stored = layer.get_submodule(spec.name).get_parameter("weight")
            weight_OC = stored.t() if spec.transposed else stored
            full = torch.zeros(weight_OC.shape, dtype=torch.float32)
            full[:, columns.cpu()] = refit(weight_OC, grams[spec], columns, damping).float().cpu()
            found[arch.module_name(index, spec)] = full
        if progress is not None:
            progress(index + 1, arch.layers, f"layer {index}")
    return found


@contextmanager
def _gathering(layer: nn.Module, kept: Mapping[LinearSpec, Tensor]) -> Iterator[dict[LinearSpec, Tensor]]:
    """Sum ``X X_kept^T`` [C, K] over all calls of the layer's linears; float32 products, float64 sums."""
    grams: dict[LinearSpec, Tensor] = {}

    def hook(spec: LinearSpec) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def add(module: nn.Module, args: tuple[Any, ...]) -> None:
            x_TC = args[0].flatten(0, -2).float()
            part = (x_TC.T @ x_TC.index_select(1, kept[spec])).double()
            grams[spec] = grams[spec] + part if spec in grams else part

        return add

    handles = [layer.get_submodule(spec.name).register_forward_pre_hook(hook(spec)) for spec in kept]
    try:
        yield grams
    finally:
        for handle in handles:
            handle.remove()


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
        layer.register_forward_pre_hook(remember(index), with_kwargs=True) for index, layer in enumerate(layers)
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


def _run(layer: nn.Module, hidden: Tensor, call: dict[str, Any]) -> Tensor:
    result = layer(hidden, **call)
    output: Tensor = result[0] if isinstance(result, tuple) else result
    return output
