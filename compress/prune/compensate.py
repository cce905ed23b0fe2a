"""Repair after pruning without training: refit o and down to what they did with all their inputs.

The optimal-brain-surgeon step on whole groups, solved as ridge regression on real activations. Inputs and targets
both come from the full model: refitting on the drifted inputs of already pruned layers was measured to be far
worse (the regression shrinks its answer to allow for the noise, layer after layer). No gradients, no labels, one
forward pass, one layer's statistics in memory at a time.

Shapes: N windows, S tokens, T tokens of a batch, O output rows, C input columns, K kept columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from compress.engine import LOCAL, Engine, single_thread
from compress.errors import UsageError
from compress.importance.gram_store import GramStore
from compress.importance.moments import OUTPUTS, require_finite
from compress.kept import NOTHING_KEPT, Kept
from compress.model.architecture import Architecture, LinearSpec
from compress.model.layerwise import LayerWalk, gathered_grams
from compress.model.resident import Unit, enclosing_unit, resident
from compress.progress import Progress
from compress.structure import LayerStructure, StructureMap, kept_columns

REFITS = 2
"""Matrices that are refitted at once."""
DAMPING = 0.02
"""Ridge of the refit: on validation text 0.03 was best of 16,384 calibration tokens, 0.01 of 32,768; both are flat."""


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
    system = gram[kept_K]
    ridge = damping * system.diagonal().mean()
    right_OK = weight[:, kept_K]
    if not ridge > 0:  # the kept inputs are all zero
        return right_OK
    right_OK.mul_(ridge).add_(weight @ gram)
    del weight, gram  # the factorization needs room
    system.diagonal().add_(ridge)
    return torch.cholesky_solve(right_OK.T, torch.linalg.cholesky(system)).T


@contextmanager
def swapped(model: nn.Module, arch: Architecture, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """The model with other ``weights`` (module name -> [out, in]) for a while; then with its own again.

    A streamed model reads them from the mapping when it runs a layer.
    """
    transposed = {arch.module_name(i, s) for i in range(arch.layers) for s in arch.linears if s.transposed}
    own: dict[nn.Parameter, Tensor] = {}
    streamed: list[tuple[Unit, nn.Module]] = []

    def stored(name: str) -> Tensor:
        return weights[name].t() if name in transposed else weights[name]

    try:
        for name in weights:
            module = model.get_submodule(name)
            parameter = module.get_parameter("weight")
            unit = enclosing_unit(model, name)
            if unit is not None:
                streamed.append((unit, module))
                unit.replace(module, "weight", partial(stored, name))
                continue
            own[parameter] = parameter.data
            parameter.data = stored(name).to(parameter)
        yield
    finally:
        for parameter, data in own.items():
            parameter.data = data
        for unit, module in streamed:
            unit.replace(module, "weight", None)


def _columns(arch: Architecture, device: torch.device, kept: LayerStructure) -> dict[LinearSpec, Tensor]:
    """The kept input columns of those of o and down that lose some."""
    found: dict[LinearSpec, Tensor] = {}
    for spec in arch.linears:
        columns = kept_columns(arch, spec, kept) if spec.role in OUTPUTS else None
        if columns is not None:
            found[spec] = columns.to(device)
    return found


def _device(layer: nn.Module) -> torch.device:
    return next(layer.parameters()).device


def _weight(layer: nn.Module, spec: LinearSpec) -> Tensor:
    stored = layer.get_submodule(spec.name).get_parameter("weight")
    return stored.t() if spec.transposed else stored


@torch.no_grad()
def gather_moments(
    model: nn.Module,
    arch: Architecture,
    ids_NS: Tensor,
    store: GramStore,
    *,
    batch: int = 4,
    progress: Progress | None = None,
) -> None:
    """Fill ``store`` with the second moments that :func:`refit_from_store` needs for any structure.

    Args:
        model: The full model; left as it is.
        arch: Its architecture.
        ids_NS: Calibration tokens, int64 [N, S].
        store: Where they go. What an interrupted run has left there stays; the model still runs through those layers.
        batch: Windows per forward pass; an incomplete last batch is left out.
        progress: Called after every layer.

    Raises:
        CompressError: There are fewer windows than one batch, or the activations are not finite.
    """
    walk = LayerWalk(model, arch, ids_NS, batch=batch)
    for index, layer in enumerate(walk.layers):
        outputs = [spec for spec in arch.linears_at(index) if spec.role in OUTPUTS]
        known = store.has(index)
        with gathered_grams(layer, {} if known else dict.fromkeys(outputs)) as grams:
            walk.advance(index)
        for spec, gram_CC in grams.items():
            require_finite(gram_CC, f"The inputs of {arch.module_name(index, spec)}")
        if not known:
            store.put(index, grams)
        if progress is not None:
            progress(index + 1, arch.layers, f"layer {index}")


@torch.no_grad()
def refit_from_store(
    weight_of: Callable[[str], Tensor],
    arch: Architecture,
    structure: StructureMap,
    store: GramStore,
    *,
    damping: float = DAMPING,
    into: MutableMapping[str, Tensor] | None = None,
    kept: Kept = NOTHING_KEPT,
    engine: Engine = LOCAL,
    progress: Progress | None = None,
) -> MutableMapping[str, Tensor]:
    """What :func:`compensate` gives, from second moments that were gathered before; no model is run.

    Args:
        weight_of: Module name -> its weight [out, in].
        arch: The architecture of the full model.
        structure: What is kept.
        store: Moments of the inputs of o and down, of every layer.
        damping: See :func:`refit`.
        into: As for :func:`compensate`.
        kept: Has the layers that an interrupted run for the same structure has refitted.
        engine: Solves the systems; in this process at most ``REFITS`` at once.
        progress: Called after every layer.

    Raises:
        UsageError: The damping is not above zero.
    """
    _check_damping(damping)
    found: MutableMapping[str, Tensor] = {} if into is None else into
    cpu = torch.device("cpu")

    def systems() -> Iterator[_System]:
        for index, layer in enumerate(structure.layers):
            for spec, columns in _columns(arch, cpu, layer).items():
                name, width = arch.module_name(index, spec), arch.at(index).linear_shape(spec)[1]
                if kept.has(name):
                    found[name] = _widened(kept.get(name)["kept"], columns, width)
                elif len(columns):
                    gram_CK = store.get(index, spec)[:, columns]
                    yield _System(name, weight_of(name), gram_CK, columns, width, damping)
            if progress is not None:
                progress(index + 1, arch.layers, f"layer {index}")

    def keep(system: _System, weight_OK: Tensor) -> None:
        kept.put(system.name, {"kept": weight_OK})
        found[system.name] = _widened(weight_OK, system.columns, system.width)

    engine.at_most(REFITS).run(_solved, systems(), keep)
    return {name: found[name] for name in _names(arch, structure) if name in found} if into is None else found


def _names(arch: Architecture, structure: StructureMap) -> Iterator[str]:
    for index in range(len(structure.layers)):
        yield from (arch.module_name(index, spec) for spec in arch.linears_at(index) if spec.role in OUTPUTS)


@dataclass(frozen=True, slots=True, eq=False)
class _System:
    """A matrix to be refitted, with the columns that stay of the second moment of its inputs."""

    name: str
    weight_OC: Tensor
    gram_CK: Tensor
    columns: Tensor
    width: int
    damping: float


def _solved(system: _System) -> Tensor:
    return refit(system.weight_OC, system.gram_CK, system.columns, system.damping).float()


def _widened(weight_OK: Tensor, columns: Tensor, width: int) -> Tensor:
    """A refitted weight at full size, float32 on the CPU, zero in the removed columns."""
    full = torch.zeros(len(weight_OK), width, dtype=torch.float32)
    full[:, columns.cpu()] = weight_OK.float().cpu()
    return full


def _check_damping(damping: float) -> None:
    if not damping > 0:
        raise UsageError(f"The damping is {damping}.", "Give a number above zero, such as 0.01.")


@torch.no_grad()
def compensate(
    model: nn.Module,
    arch: Architecture,
    structure: StructureMap,
    ids_NS: Tensor,
    *,
    batch: int = 4,
    damping: float = DAMPING,
    into: MutableMapping[str, Tensor] | None = None,
    kept: Kept = NOTHING_KEPT,
    progress: Progress | None = None,
) -> MutableMapping[str, Tensor]:
    """New weights of o and down for the pruned model.

    Args:
        model: The full model; left as it is.
        arch: Its architecture.
        structure: What is kept.
        ids_NS: Calibration tokens, int64 [N, S]; some 16 per kept column or more.
        batch: Windows per forward pass; an incomplete last batch is left out.
        damping: See :func:`refit`.
        into: Where the weights go, an empty mapping; None: a dictionary. All of them together may not fit into memory.
        kept: Has the matrices that an interrupted run for the same structure has refitted; the model still runs through
            their layers.
        progress: Called after every layer.

    Returns:
        Module name -> weight [out, in] in float32 at full size, zero in the removed columns; only for matrices that
        lose columns.

    Raises:
        UsageError: The damping is not above zero.
        CompressError: There are fewer windows than one batch, or the activations are not finite.
    """
    _check_damping(damping)
    walk = LayerWalk(model, arch, ids_NS, batch=batch)
    found: MutableMapping[str, Tensor] = {} if into is None else into
    for index, layer in enumerate(walk.layers):
        columns = _columns(arch, _device(layer), structure.layers[index])
        # a branch without columns is gone: there is nothing to refit
        stay = {spec: each for spec, each in columns.items() if len(each)}
        names = {spec: arch.module_name(index, spec) for spec in stay}
        left = {spec: each for spec, each in stay.items() if not kept.has(names[spec])}
        with resident(layer):
            with gathered_grams(layer, left) as grams:
                walk.advance(index)
            weights = {spec: _weight(layer, spec).detach() for spec in left}
        for spec, each in stay.items():
            if spec in left:
                require_finite(grams[spec], f"The inputs of {names[spec]}")
                with single_thread():
                    refitted = refit(weights.pop(spec), grams.pop(spec), each, damping).float()
                kept.put(names[spec], {"kept": refitted})
            else:
                refitted = kept.get(names[spec])["kept"]
            found[names[spec]] = _widened(refitted, each, arch.at(index).linear_shape(spec)[1])
        if progress is not None:
            progress(index + 1, arch.layers, f"layer {index}")
    return found
