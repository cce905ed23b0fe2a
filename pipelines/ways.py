"""Whether a stage fits into memory whole, or layer by layer, or not at all: decided before it begins."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from compress.errors import CompressError, UsageError
from compress.heap import keep_nothing
from compress.machine import capacity
from compress.model.config import build_config
from compress.model.planned import PlannedCheckpoint
from compress.model.states import Room
from compress.model.uneven import plain_config
from compress.pipelines.measure import LENGTH, WINDOWS
from compress.pipelines.model_input import ModelInput
from compress.pipelines.phase import ROOM, Footprint, Ground
from compress.pipelines.plan_models import Packed, PlannedModel
from compress.pipelines.plan_verdict import change, device_bytes, host_peak
from compress.pipelines.reporter import human_bytes
from compress.pipelines.settings import Common
from compress.pipelines.stage import Context
from compress.pipelines.way import WHOLE, Way
from compress.quantize.checkpoint import MatrixRecord, read_lq_config
from compress.solvers.budget import parse_budget

Count = Callable[[Ground], Footprint]
"""What a stage holds, with models opened one way."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """What a stage needs in the way that was chosen for it.

    Attributes:
        way: How models are opened.
        needs: Bytes of the host's memory at its peak, of all its processes.
        phase: When that is.
        term: What most of it is.
        fits: Whether it does; None where nothing is known.
        change: What needs less; None where it fits.
    """

    way: Way
    needs: float
    phase: str
    term: str
    fits: bool | None
    change: str | None


def limit_of(common: Common) -> int | None:
    """``--memory-limit`` in bytes; None without one.

    Raises:
        UsageError: It is no memory size.
    """
    if common.memory_limit is None:
        return None
    budget = parse_budget(common.memory_limit)
    if budget.kind != "bytes":
        raise UsageError(
            f"--memory-limit {common.memory_limit} is no memory size.", "Give bytes, such as 4GiB."
        )
    return int(budget.value)


def choose_way(
    context: Context,
    verb: str,
    model: ModelInput,
    device: str,
    dtype: torch.dtype,
    count: Count,
    *,
    source: str | None = None,
    streams: bool = True,
    workers: int = 1,
    recompute: bool = False,
) -> Way:
    """How ``verb`` opens models: whole where that fits into ``--memory-limit``, else layer by layer.

    Without the option the limit is what the host has free, and nothing is refused. Results are the same either way.

    Args:
        context: Gives the limit and the reporter.
        verb: The stage.
        model: What it works on; gives the length of windows.
        device: Where models compute; one of its own has to hold them too.
        dtype: In which precision.
        count: The stage's footprint on a ground.
        source: Text source; a model that writes its own text has to be in memory whole.
        streams: Whether the stage can open models layer by layer.
        workers: Matrices that could be worked on at once.
        recompute: Layers run again in backward passes: what each frees has to go back to the system, which would
            otherwise hold most of what was saved.

    Raises:
        UsageError: The limit is no memory size.
        CompressError: The stage needs more than the limit; names the phase, what it holds and what needs less.
    """
    limit = limit_of(context.common)
    machine = capacity(context.workspace.root, device)
    ground = ground_of(model, context.common.effort or "quick", dtype)
    room = Room(bytes=ROOM, folder=context.workspace.root)
    found = best_fit(
        count,
        ground,
        verb,
        limit=machine.host_free if limit is None else limit,
        device_free=machine.device_free,
        room=room,
        streams=streams,
        workers=workers,
    )
    refuse(context.common, verb, found)
    way = found.way
    if way.streamed and source == "self":
        raise CompressError(
            f"--data self lets the model write its text, for which it has to be in memory whole, and {verb} reads it "
            "layer by layer here.",
            "Give another --data, or more memory.",
        )
    if way.streamed:
        context.reporter.say(
            f"{verb}: models are read layer by layer; counted peak {human_bytes(found.needs)}."
        )
    if way.streamed or limit is not None or recompute:
        keep_nothing()
    return way


def refuse(common: Common, verb: str, found: Fit) -> None:
    """Refuse what ``--memory-limit`` has no room for; nothing where it is not given.

    Raises:
        CompressError: Names the phase, what it holds and what needs less.
    """
    if common.memory_limit is None or found.fits is not False:
        return
    raise CompressError(
        f"{verb} needs {human_bytes(found.needs)} of memory, and --memory-limit is {common.memory_limit}: its peak is "
        f"in the phase {found.phase!r}, most of it {found.term}.",
        f"Give --memory-limit {_rounded_up(found.needs)} or more, or change: {found.change}.",
    )


def best_fit(
    count: Count,
    ground: Ground,
    verb: str,
    *,
    limit: int | None,
    device_free: int | None,
    room: Room | None = None,
    streams: bool = True,
    workers: int = 1,
) -> Fit:
    """The first of three ways that fits: whole, streamed with the next layer read ahead, streamed.

    Each is tried with as many matrices at once as there may be, then with half of them, down to one. Where none fits,
    the last.

    Args:
        count: The stage's footprint on a ground.
        ground: What all ways compute with.
        verb: The stage.
        limit: Bytes of the host's memory; None: not known, and models are opened whole.
        device_free: Of a device of its own; None: the host computes, or not known.
        room: For hidden states, where models are streamed.
        streams: Whether the stage can open models layer by layer.
        workers: Matrices that could be worked on at once.
    """
    ways = [WHOLE]
    if streams:
        ways += [Way(streamed=True, ahead=ahead, room=room) for ahead in (True, False)]
    tried = []
    for way in (replace(way, workers=number) for way in ways for number in halves(workers)):
        footprint = count(replace(ground, streamed=way.streamed, ahead=way.ahead, workers=way.workers))
        needs, phase, terms, _ = host_peak(
            footprint,
            separate=device_free is not None,
            returned=way.streamed or limit is not None,
        )
        on_device = max(map(device_bytes, footprint.phases))
        known = limit is not None
        fits = needs <= (limit or 0) if known else None
        if device_free is not None and on_device > device_free:
            fits = False
        term = max(terms, key=lambda name: terms[name])
        limiting: dict[str, Any] = {"resource": "host memory", "phase": phase.name, "terms": terms}
        limiting["needs"] = needs
        tried.append(
            Fit(
                way=way,
                needs=needs,
                phase=phase.name,
                term=f"{term} ({human_bytes(terms[term])})",
                fits=fits,
                change=None if fits is not False else change(limiting, verb, streamed=streams),
            )
        )
        if fits is not False:
            break
    return tried[-1]


def halves(workers: int) -> list[int]:
    """The number, half of it, and so on down to one."""
    found = [workers]
    while found[-1] > 1:
        found.append(found[-1] // 2)
    return found


def ground_of(model: ModelInput, effort: str, dtype: torch.dtype) -> Ground:
    """What all stages on a model compute with."""
    config = build_config(plain_config(model.checkpoint.config))
    positions = int(getattr(config, "max_position_embeddings", None) or LENGTH)
    return Ground(itemsize=dtype.itemsize, length=min(LENGTH, positions), windows=WINDOWS[effort])


def counted(model: ModelInput) -> PlannedModel:
    """A model on disk, as footprints count it.

    One whose weights a dry run has not fetched counts as dense: only their headers say what codes take.
    """
    checkpoint, arch = model.checkpoint, model.architecture
    declared = checkpoint.config.get("quantization_config")
    if declared is None or isinstance(checkpoint, PlannedCheckpoint):
        return PlannedModel(name=model.name, input=model)
    records = read_lq_config(declared)
    sizes = {"linear": 0.0, "vocabulary": 0.0}
    for name, record in records.items():
        parts = (f"{name}.{part}" for part in record.layout())
        outside = name in (arch.embedding_module, arch.head_module)
        sizes["vocabulary" if outside else "linear"] += sum(8.0 * checkpoint.nbytes(part) for part in parts)
    packed = Packed(
        linear_bits=sizes["linear"],
        vocabulary_bits=sizes["vocabulary"] or None,
        nominal=sizes["linear"] / arch.decoder_linear_parameters(),
        matrices=len(records),
    )
    return PlannedModel(name=model.name, input=_without_codes(model, records), packed=packed)


def _without_codes(model: ModelInput, records: Mapping[str, MatrixRecord]) -> ModelInput:
    """The model with the matrices that its codes stand for."""
    checkpoint = model.checkpoint
    codes = {f"{name}.{part}" for name, record in records.items() for part in record.layout()}
    kept = [name for name in checkpoint.names if name not in codes]
    shapes = {name: checkpoint.shape(name) for name in kept}
    dtypes = {name: checkpoint.dtype(name) for name in kept}
    for name, record in records.items():
        shapes[f"{name}.weight"], dtypes[f"{name}.weight"] = record.shape, torch.bfloat16
    dense = PlannedCheckpoint(checkpoint.path, config=checkpoint.config, shapes=shapes, dtypes=dtypes)
    return replace(model, checkpoint=dense)


def _rounded_up(needs: float) -> str:
    return f"{int(needs / (1 << 20) * 10 / 1024) / 10 + 0.1:.1f}GiB"
