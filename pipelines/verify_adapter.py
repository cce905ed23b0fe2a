"""An adapter: its factors and its base; a recovered one sliced by the structure gives the trained one back."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from compress.adapters.adapter_file import AdapterFile, Scaling, owner
from compress.adapters.factors import difference_factors, squared_norm
from compress.adapters.initial_factors import PREFIX
from compress.adapters.places import Place, places_of
from compress.model.base_record import FILE_NAME as BASE
from compress.model.base_record import BaseRecord
from compress.model.checkpoint import Checkpoint, checkpoint_architecture
from compress.pipelines.model_input import HUB_NAME
from compress.pipelines.small_files import public_name
from compress.pipelines.verify_target import Finding, Target, Value
from compress.progress import Progress
from compress.structure import FILE_NAME, StructureMap

TOLERANCE = 1e-5
"""Relative; norms of float32 factors."""
PAIR = ("lora_A.weight", "lora_B.weight")


def check_factors(target: Target, adapter: AdapterFile) -> Iterator[Finding]:
    """Two factors per module, of the configured rank, and the numbers that the stage recorded of them."""
    largest, square = 0, 0.0
    pairs = {
        f"{PREFIX}{owner(n)[0]}.lora_{s}.weight" for n in adapter.names if owner(n)[1] in PAIR for s in "AB"
    }
    missing = pairs - set(adapter.names)
    faults = [f"the tensor {name} is missing" for name in sorted(missing)]
    for module in adapter.modules:
        if f"{PREFIX}{module}.lora_B.weight" in missing:
            continue
        factor_a, factor_b = adapter.factors(module)
        scaling = adapter.scaling(module)
        if not factor_a.shape[0] == factor_b.shape[1] == scaling.rank:
            ranks = f"{factor_a.shape[0]} and {factor_b.shape[1]}"
            faults.append(f"the factors of {module} have ranks {ranks}, the config says {scaling.rank}")
            continue
        largest = max(largest, scaling.rank)
        square += scaling.value**2 * squared_norm(factor_a, factor_b)
    yield from (target.differs("factors", fault) for fault in faults)
    if faults:
        return
    parameters = sum(adapter.read(name).numel() for name in adapter.names)
    metrics = target.metrics
    values = [
        Value(what="trainable_parameters", recorded=metrics.get("trainable_parameters"), found=parameters),
        Value(what="adapter_parameters", recorded=metrics.get("adapter_parameters"), found=parameters),
        Value(what="modules", recorded=metrics.get("modules"), found=len(adapter.modules)),
        Value(what="rank", recorded=metrics.get("rank"), found=largest),
        Value(
            what="delta_norm",
            recorded=metrics.get("delta_norm"),
            found=math.sqrt(square),
            tolerance=TOLERANCE,
            floor=1e-30,
        ),
    ]
    found = f"{len(adapter.modules)} modules, rank up to {largest}, {parameters} parameters"
    if target.stage is None:
        yield target.ok("factors", found)
    else:
        yield from target.compare("factors", values, found)


def check_base(target: Target, adapter: AdapterFile) -> Iterator[Finding]:
    """The base that ``adapter_config.json`` names: the stage it was trained on, or the full model."""
    named, chain, stage = adapter.config.get("base_model_name_or_path"), target.chain, target.stage
    if stage is None or chain is None:
        yield target.not_checked("base", f"it names {named!r}; the folder lies in no workspace that lists it")
        return
    original = str(chain.model.get("name"))
    before = chain.model_before(target.path.name)
    values: list[Value] = []
    if stage.verb == "recover":
        onto = stage.record["config"].get("onto") or original
        expected, recorded = HUB_NAME.get(onto, onto), target.metrics.get("onto")
        if (target.path / BASE).is_file():
            full, found = stage.record["inputs"].get("full"), BaseRecord.load(target.path / BASE).fingerprint
            values.append(Value(what=f"full model in {BASE}", recorded=full, found=found))
    else:
        expected = public_name(original) if before is None else before.path.name
        recorded = target.metrics.get("base")
    values += [
        Value(what="base in adapter_config.json", recorded=expected, found=named),
        Value(what="base in the metrics", recorded=recorded, found=expected),
    ]
    yield from target.compare("base", values, f"{named}")


def check_slices(target: Target, adapter: AdapterFile, progress: Progress) -> Iterator[Finding]:
    """A recovered adapter, sliced by what pruning kept, against the trained one; zeros everywhere else.

    One that was compressed to a lower rank is compared by the norm of the difference that the stage recorded.
    """
    chain = target.chain
    elsewhere = target.stage is not None and target.stage.record["config"].get("adapter")
    trained = None if chain is None or elsewhere else chain.find("train")
    if chain is None or trained is None:
        yield target.not_checked("slices", "the trained adapter is not here")
        return
    small = chain.model_before(trained.path.name)
    base = chain.original if small is None else small.path
    pruned = chain.find("prune")
    source = chain.original if pruned is None else pruned.path
    if base is None:
        yield target.not_checked("slices", "the model that the adapter was trained on is not here")
        return
    arch, kept = checkpoint_architecture(Checkpoint(base)), None
    if source is not None and (source / FILE_NAME).is_file():
        kept = StructureMap.load(source / FILE_NAME)
        arch = replace(
            arch, heads=kept.heads, kv_heads=kept.kv_heads, channels=kept.channels, layer_shapes=None
        )
    places = places_of(arch, kept)
    faults: list[str] = []
    square = lost = 0.0
    with AdapterFile(trained.path) as start:
        if set(start.modules) != set(adapter.modules):
            faults.append("it adapts other modules than the trained adapter")
        shared = sorted(set(start.modules) & set(adapter.modules))
        for done, module in enumerate(shared, start=1):
            wanted = _wanted(start, module)
            found = _Factors(*adapter.factors(module), adapter.scaling(module))
            cut, fault = _sliced(found, places.get(module), wanted)
            square += wanted.scaling.value**2 * squared_norm(wanted.a, wanted.b)
            if fault:
                faults.append(f"{module} {fault}")
            elif cut.scaling.rank < wanted.scaling.rank:
                lost += _distance(cut, wanted)
            elif not (torch.equal(cut.a, wanted.a) and torch.equal(cut.b, wanted.b)):
                faults.append(f"{module}, sliced, is not the trained adapter")
            progress(done, len(shared), module)
        differences = len(start.initial_modules)
    yield from (target.differs("slices", fault) for fault in faults)
    if faults:
        return
    values = [
        Value(
            what="truncation_error",
            recorded=target.metrics.get("truncation_error"),
            found=math.sqrt(lost / square) if square else 0.0,
            tolerance=1e-3,
            floor=TOLERANCE,
        ),
        Value(what="differences", recorded=target.metrics.get("differences"), found=differences),
    ]
    summary = f"{len(shared)} modules, sliced, are those of {trained.path.name}"
    yield from target.compare("slices", values, summary)


@dataclass(frozen=True, slots=True)
class _Factors:
    """A [r, in], B [out, r] and how much their product counts."""

    a: Tensor
    b: Tensor
    scaling: Scaling


def _wanted(start: AdapterFile, module: str) -> _Factors:
    """What recovery makes of a trained module before it scatters: the difference to the start, where one was kept."""
    a, b = start.factors(module)
    scaling, initial = start.scaling(module), start.initial_factors(module)
    if initial is not None:
        a, b = difference_factors(a, b, *initial)
        scaling = scaling.with_rank(a.shape[0])
    return _Factors(a, b, scaling)


def _sliced(found: _Factors, place: Place | None, wanted: _Factors) -> tuple[_Factors, str]:
    """The kept part of a recovered module, and what is wrong with the rest of it."""
    if place is not None and (found.b.shape[0], found.a.shape[1]) != place.shape:
        return found, f"is {found.b.shape[0]} x {found.a.shape[1]} where the full model has {place.shape}"
    a = found.a if place is None or place.columns is None else found.a[:, place.columns]
    b = found.b if place is None or place.rows is None else found.b[place.rows]
    if (b.shape[0], a.shape[1]) != (wanted.b.shape[0], wanted.a.shape[1]):
        return found, "does not have the trained adapter's rows and columns"
    if a.count_nonzero() != found.a.count_nonzero() or b.count_nonzero() != found.b.count_nonzero():
        return found, "is not zero where something was pruned"
    if not math.isclose(found.scaling.value, wanted.scaling.value, rel_tol=1e-9):
        return found, "has another scale than the trained adapter"
    return _Factors(a, b, found.scaling), ""


def _distance(one: _Factors, other: _Factors) -> float:
    """Squared Frobenius norm of the difference of two deltas."""
    a = torch.cat([one.a.double() * one.scaling.value, other.a.double() * -other.scaling.value])
    return squared_norm(a, torch.cat([one.b.double(), other.b.double()], dim=1))
