"""``compress plan``: a whole chain counted before anything is touched, from a config and headers alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from types import MappingProxyType
from typing import Any

import torch

from compress.errors import UsageError
from compress.evaluate.speed import Speed, measure_speed
from compress.evaluate.training_memory import adapter_parameters
from compress.machine import capacity
from compress.model.checkpoint import checkpoint_architecture, require_dense
from compress.model.config import build_config
from compress.model.load import EMBEDDED
from compress.model.planned import headers_of
from compress.model.uneven import plain_config
from compress.pipelines.footprint import (
    align_footprint,
    eval_footprint,
    quantize_footprint,
    recover_footprint,
    train_footprint,
)
from compress.pipelines.measure import LENGTH, WINDOWS
from compress.pipelines.model_input import ModelInput, device_and_dtype
from compress.pipelines.operations import (
    Work,
    align_work,
    eval_work,
    prune_work,
    quantize_work,
    recover_work,
    train_work,
)
from compress.pipelines.phase import Footprint, Ground
from compress.pipelines.plan_loram import loram_rows
from compress.pipelines.plan_models import PlannedModel, pruned, quantized
from compress.pipelines.plan_tables import show
from compress.pipelines.plan_verdict import Limits, host_peak, verdict
from compress.pipelines.prune_footprint import prune_footprint
from compress.pipelines.prune_goal import Goal, default_multiple, parse_targets, requested_goal
from compress.pipelines.reporter import Reporter
from compress.pipelines.settings import (
    AlignSettings,
    Common,
    EvalSettings,
    PlanSettings,
    PruneSettings,
    QuantizeSettings,
    TrainSettings,
    resolve,
)
from compress.pipelines.training import parse_adapter_targets
from compress.pipelines.way import WHOLE, Way
from compress.pipelines.ways import Count, best_fit, halves, limit_of
from compress.prune.shape import ShapePlan
from compress.solvers.budget import parse_budget

PRUNE = ("ratio", "params", "size", "targets", "head_unit", "multiple")
QUANTIZE = ("budget", "budget_includes", "rank", "factors", "embeddings", "objective")
"""Options of ``plan`` that ask for a stage; without any of them the chain is ``prune``, ``quantize`` and the rest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chain:
    """What was planned.

    Attributes:
        models: Original, then what each stage makes, by what ``eval`` calls it.
        adapters: Parameters of the adapter on the small model and of the recovered one.
        rounding: What became of the ratio that was asked for; None without pruning.
        stages: Footprint and work of every stage.
        settings: The settings of every stage, as JSON values.
    """

    models: tuple[PlannedModel, ...]
    adapters: tuple[int, int]
    rounding: Mapping[str, Any] | None
    stages: tuple[tuple[Footprint, Work], ...]
    settings: Mapping[str, Mapping[str, Any]]


def plan(reporter: Reporter, common: Common, settings: PlanSettings) -> dict[str, Any]:
    """Print and return the plan; see ``compress plan --help``. No weight is read, nothing is left on disk.

    Raises:
        UsageError: An option that a stage would refuse, or a memory size that cannot be.
        CompressError: There is no such model, it is no dense decoder that is understood, or the chain cannot be had.
    """
    name = settings.model or EMBEDDED
    planned_for = _device_bytes(settings)
    device, dtype = device_and_dtype(common)
    elsewhere = planned_for is not None and device == "cpu"
    if elsewhere and common.dtype == "auto":
        dtype = torch.bfloat16
    effort = common.effort or ("quick" if device == "cpu" and not elsewhere else "standard")
    checkpoint, source = headers_of(settings.model)
    require_dense(checkpoint, allow_lq=False)
    model = ModelInput(
        name=name,
        path=checkpoint.path,
        id="",
        checkpoint=checkpoint,
        architecture=checkpoint_architecture(checkpoint),
    )
    machine = capacity(common.run, device)
    if planned_for is not None:
        machine = replace(machine, device_total=planned_for, device_free=planned_for)
    workers = (common.threads or torch.get_num_threads()) if device == "cpu" and not elsewhere else 1
    chain = planned_chain(
        model,
        settings,
        effort,
        dtype,
        way=Way(workers=workers),
        room=None if elsewhere else machine.host_free,
        batched=device != "cpu" or elsewhere,
    )
    speed: Speed | None = None
    if not settings.no_time and not elsewhere:
        speed = measure_speed(common.run, device, dtype)
    limit = limit_of(common)
    if limit is None and settings.check:
        limit = machine.host_free
    limited: list[dict[str, Any] | None] = [None] * len(chain.stages)
    if limit is not None:
        limited = [*_limited(model, settings, effort, dtype, limit, machine.device_free, workers)]
    limits = Limits(device=machine.device_free, host=machine.host_free, disk=machine.disk_free)
    full = chain.models[0]
    sizes = [each.to_dict(full) for each in chain.models]
    small, recovered = chain.adapters
    sizes.append(chain.models[-1].to_dict(full, adapter=small) | {"name": "small + adapter"})
    sizes.append(full.to_dict(full, adapter=recovered) | {"name": "full + recovered"})
    result: dict[str, Any] = {
        "model": name,
        "source": source,
        "parameters": full.parameters,
        "device_bytes": machine.device_total,
        "device": "planned" if elsewhere else device,
        "dtype": str(dtype).removeprefix("torch."),
        "effort": effort,
        "settings": chain.settings,
        "sizes": sizes,
        "rounding": chain.rounding,
        "memory_limit": limit,
        "stages": [
            verdict(footprint, work, limits, speed) | {"limited": found}
            for (footprint, work), found in zip(chain.stages, limited, strict=True)
        ],
        "machine": asdict(machine),
        "speed": None if speed is None else asdict(speed),
        "rows": loram_rows(
            full.arch,
            full.parameters,
            settings,
            room=limits.host if limits.device is None else limits.device,
            itemsize=dtype.itemsize,
        ),
    }
    if settings.check:
        result["refused"] = refused = [*_without_room(result["stages"])]
        result["ok"] = not refused
    show(reporter, settings, result)
    return result


def _without_room(stages: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """The stages that fit neither whole nor layer by layer, or not on the disk."""
    for stage in stages:
        disk = next(each for each in stage["resources"] if each["resource"] == "disk")
        if stage["limited"]["fits"] is False or disk["fits"] is False:
            yield stage["verb"]


def planned_chain(
    model: ModelInput,
    settings: PlanSettings,
    effort: str,
    dtype: torch.dtype,
    *,
    exact: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
    way: Way = WHOLE,
    room: int | None = None,
    batched: bool = False,
) -> Chain:
    """The chain that the options ask for, stage by stage.

    Args:
        model: The original.
        settings: What is asked.
        effort: Fills in what is not.
        dtype: In which models compute.
        exact: By verb, options of a stage that ``plan`` does not have; a stage that is named here is planned.
        way: How stages open models that they run, and how many matrices they work on at once where ``room`` allows it.
        room: Bytes of the host's memory; None: not known.
        batched: Adapters are merged on a device of its own.

    Raises:
        UsageError, CompressError: As the stages would.
    """
    config = build_config(plain_config(model.checkpoint.config))
    positions = int(getattr(config, "max_position_embeddings", None) or LENGTH)
    ground = Ground(
        itemsize=dtype.itemsize,
        length=min(LENGTH, positions),
        windows=WINDOWS[effort],
        streamed=way.streamed,
        ahead=way.ahead,
        workers=way.workers,
    )
    asked = {part: _given(settings, part) for part in (PRUNE, QUANTIZE)}
    everything = not any(asked.values()) and not exact
    tokens = {"calibration_tokens": settings.calibration_tokens}
    loop = {
        "micro_batch": settings.micro_batch,
        "sequence": settings.sequence,
        "recompute": settings.recompute,
    }
    full = current = PlannedModel(name="original", input=model)
    models, stages = [full], []
    used: dict[str, Mapping[str, Any]] = {}
    rounding = None
    if everything or asked[PRUNE] or "prune" in exact:
        prune = resolve(PruneSettings, {**asked[PRUNE], **tokens, **loop, **exact.get("prune", {})}, effort)
        goal = _goal(model, prune)
        shapes = goal.foreseen()
        current = pruned(full, shapes)
        rounding = _rounding(goal, shapes, full, current)
        stages.append(
            (prune_footprint(full, current, prune, ground), prune_work(full, current, prune, ground))
        )
        models.append(current)
        used["prune"] = asdict(prune) | {"multiple": goal.multiple, "ratio": goal.ratio}
    if settings.align or "align" in exact:
        if rounding is None:
            raise UsageError("--align trains a pruned model, and this chain has none.", "Give --ratio too.")
        align = resolve(AlignSettings, {**loop, **exact.get("align", {})}, effort)
        stages.append(
            (align_footprint(current, full, align, ground), align_work(current, full, align, ground))
        )
        used["align"] = asdict(align)
    if everything or asked[QUANTIZE] or "quantize" in exact:
        quantize = resolve(
            QuantizeSettings, {**asked[QUANTIZE], **tokens, **exact.get("quantize", {})}, effort
        )
        known = current is not full
        small = quantized(current, quantize)
        for workers in halves(ground.workers):
            here = replace(ground, workers=workers)
            footprint = quantize_footprint(current, small, quantize, here, known=known)
            if room is None or host_peak(footprint, separate=False, returned=way.streamed)[0] <= room:
                break
        stages.append((footprint, quantize_work(current, small, quantize, ground, known=known)))
        current = small
        models.append(current)
        used["quantize"] = asdict(quantize)
    train = resolve(TrainSettings, {"rank": settings.train_rank, **loop, **exact.get("train", {})}, effort)
    head = "lm_head" in parse_adapter_targets(train.adapter_targets)
    own, recovered = (adapter_parameters(each.arch, train.rank, head=head) for each in (current, full))
    merged = settings.merge or bool(exact.get("recover", {}).get("merge"))
    evaluation = resolve(EvalSettings, exact.get("eval", {}), effort)
    entries = [*((each, 0) for each in models), (current, own), (full, recovered)]
    test: dict[str, Any] = {"length": min(evaluation.sequence, positions), "windows": evaluation.windows}
    test["reference"] = (full, 0) if evaluation.kl_windows else None
    stages += [
        (train_footprint(current, train, ground), train_work(current, train, ground)),
        (
            recover_footprint(full, recovered, ground, merged=merged, batched=batched),
            recover_work(full, recovered),
        ),
        (
            eval_footprint(entries, ground, **test),
            eval_work(entries, ground, **test, kl_windows=evaluation.kl_windows),
        ),
    ]
    used |= {"train": asdict(train), "eval": asdict(evaluation)}
    return Chain(
        models=tuple(models),
        adapters=(own, recovered),
        rounding=rounding,
        stages=tuple(stages),
        settings=used,
    )


def _limited(
    model: ModelInput,
    settings: PlanSettings,
    effort: str,
    dtype: torch.dtype,
    limit: int,
    device_free: int | None,
    workers: int,
) -> Iterator[dict[str, Any]]:
    """What each stage makes of ``--memory-limit``, as JSON values: the way it opens models, or what to change."""
    ways = (
        Way(workers=workers),
        *(Way(streamed=True, ahead=ahead, workers=workers) for ahead in (True, False)),
    )
    chains = {
        (way.streamed, way.ahead): planned_chain(
            model, settings, effort, dtype, way=way, room=limit, batched=device_free is not None
        )
        for way in ways
    }
    ground = Ground(itemsize=dtype.itemsize, length=LENGTH, windows=WINDOWS[effort])

    def count_of(at: int) -> Count:
        def count(here: Ground) -> Footprint:
            return chains[here.streamed, here.ahead].stages[at][0]

        return count

    for at, (footprint, _) in enumerate(chains[True, True].stages):
        found = best_fit(
            count_of(at),
            ground,
            footprint.verb,
            limit=limit,
            device_free=None if footprint.verb == "recover" else device_free,
            streams=footprint.verb not in ("align", "eval"),
        )
        yield {
            "way": "layer by layer" if found.way.streamed else "whole",
            "ahead": found.way.streamed and found.way.ahead,
            "needs": found.needs,
            "fits": found.fits,
            "phase": found.phase,
            "change": found.change,
        }


def _given(settings: PlanSettings, names: tuple[str, ...]) -> dict[str, Any]:
    return {name: value for name in names if (value := getattr(settings, name)) is not None}


def _goal(model: ModelInput, settings: PruneSettings) -> Goal:
    targets = parse_targets(settings.targets)
    multiple = settings.multiple or default_multiple(model.architecture.channels)
    return requested_goal(model, settings, targets, multiple)


def _rounding(goal: Goal, shapes: ShapePlan, full: PlannedModel, small: PlannedModel) -> dict[str, Any]:
    """What whole heads and multiples of channels make of the ratio, as JSON values."""
    near = [shape.achieved for shape in (*shapes.candidates, *shapes.further)] or [shapes.achieved]
    one = shapes.uniform
    return {
        "asked": goal.ratio,
        "achieved": shapes.achieved,
        "reason": shapes.reason,
        "shape": None if one is None else asdict(one),
        "of_all_parameters": 1 - small.parameters / full.parameters,
        "of_all_bytes": 1 - small.file_bytes / full.file_bytes,
        "near_shapes": {"count": len(near), "least": min(near), "most": max(near)},
    }


def _device_bytes(settings: PlanSettings) -> int | None:
    """Memory of the device that was named; None without one."""
    if settings.memory is None:
        return None
    budget = parse_budget(settings.memory)
    if budget.kind != "bytes":
        raise UsageError(f"--memory {settings.memory} is no memory size.", "Give bytes, such as 24GiB.")
    return int(budget.value)
