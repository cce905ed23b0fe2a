"""Whether a stage fits: its peak against what there is, what limits it, and what to change."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from compress.evaluate.speed import Speed
from compress.pipelines.operations import Work
from compress.pipelines.phase import AGAIN, Footprint, Phase

PROCESS = 0.63e9
"""Resident bytes of a process with all libraries, a tokenizer and WikiText-2: 583 MB, 633 MB at its peak, measured."""

RETAINED = 1.5
"""What the C library holds of its heap for a byte of temporaries, freed or not: measured on SmolLM2-135M, whose
activations are blocks below 32 MiB, which it does not give back. Larger blocks are, so large models hold less."""

TEMPORARY = frozenset(
    {
        "activations",
        "hidden states",
        "input moments",
        "input statistics",
        "least squares",
        "logits",
        "loss",
        "matrices at work",
        "one layer",
        "one layer unpacked",
        "rounded weights",
        "teacher's logits",
        "update",
    }
)
"""Terms that come and go within a phase; the others are there from its beginning to its end."""

CHANGES = {
    "output gradients": "another --criterion: wanda and magnitude need no gradients",
    "score": "another --criterion: wanda and magnitude hold no second moments; fewer --calibration-tokens",
    "score and mask": "--micro-batch 1, a shorter --sequence, or --int8",
    "gradients of costs": "--shape uniform, which needs no costs",
    "measure costs": "--shape uniform, which needs no costs",
    "try shapes": "--trials 1",
    "mean inputs": "--repair none",
    "moments of inputs": "--repair none",
    "refit": "--repair none",
    "repair": "--repair-loss text (no teacher), --micro-batch 1, or --repair-steps 0",
    "backward": "--micro-batch 1, a shorter --sequence, or no alignment",
    "update": "align with --optimizer galore, or not at all",
    "project": "a smaller model (a larger --ratio), or no alignment",
    "sensitivities": "--objective frobenius, which loads no model",
    "error tables": "--objective frobenius, which loads no model",
    "Fisher information": "--objective frobenius, which loads no model",
    "merge": "no --merge, or --device cpu, which holds one matrix at a time",
    "train": "a smaller model (--ratio, --budget), --micro-batch 1, or a shorter --sequence",
}
"""By phase: what takes less. Phases that are not here load a model whole, and only a larger machine helps."""


TRAINED = ("score", "score and mask", "repair", "backward", "train")
SCORED = ("output gradients", "gradients of costs")
"""Phases in which ``--recompute`` takes less: of models held whole, and of those that are, unless they are streamed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Bytes that may be used; None where they are not known, or there is no device of its own."""

    device: int | None
    host: int | None
    disk: int


def device_bytes(phase: Phase) -> float:
    """What a phase holds on a device of its own."""
    return float(sum(phase.device.values()))


def host_peak(
    footprint: Footprint, *, separate: bool, returned: bool = False
) -> tuple[float, Phase, dict[str, float], tuple[float, Phase]]:
    """Peak of the host's memory with its phase and terms, and that of this process alone, mapped files included.

    Beside a device of its own a phase holds its host terms and models on their way. Where the host computes, a process
    keeps what it has freed: its peak is what the largest phase holds for good, and `RETAINED` times the temporaries
    of the phase that has most. That it is given back when a model is loaded in between is not counted. With
    ``returned``, or where layers run again, the C library gives back what is freed, as it is told to where memory is
    short (`compress.pipelines.ways`). A second process holds what it holds, and its own libraries.
    """
    returned = returned or any(phase.name.endswith(AGAIN) for phase in footprint.phases)
    if separate:
        kept = 0.0
        own = {id(phase): PROCESS + phase.staging + sum(phase.host.values()) for phase in footprint.phases}
    elif returned:
        kept = 0.0
        own = {
            id(phase): PROCESS + sum(phase.device.values()) + sum(phase.host.values())
            for phase in footprint.phases
        }
    else:
        kept = RETAINED * max(sum(_parts(phase, temporary=True).values()) for phase in footprint.phases)
        own = {
            id(phase): PROCESS + kept + sum(_parts(phase, temporary=False).values())
            for phase in footprint.phases
        }

    def whole(phase: Phase) -> float:
        return own[id(phase)] + (phase.beside + PROCESS if phase.beside else 0.0)

    top = max(footprint.phases, key=whole)
    terms = dict(top.host) | ({"model on its way": top.staging} if separate else dict(top.device))
    terms |= {"libraries": PROCESS}
    terms |= {"second process": top.beside + PROCESS} if top.beside else {}
    if (more := whole(top) - sum(terms.values())) > 1:
        terms["kept by the allocator"] = more
    process = max(footprint.phases, key=lambda phase: own[id(phase)] + phase.pages)
    return whole(top), top, terms, (own[id(process)] + process.pages, process)


def _parts(phase: Phase, *, temporary: bool) -> dict[str, float]:
    terms = {**phase.device, **phase.host}
    return {name: value for name, value in terms.items() if (name in TEMPORARY) is temporary}


def verdict(footprint: Footprint, work: Work, limits: Limits, speed: Speed | None) -> dict[str, Any]:
    """A stage as JSON values: peaks by resource with the phase and its terms, whether each fits, and the time.

    ``process_bytes`` is what the stage's own process would show as its peak resident memory, mapped files included.

    Args:
        footprint: The stage.
        work: What it computes.
        limits: What there is. With a limit of a device, models are taken to be on a device of their own.
        speed: Measured rates; None: no times.
    """
    separate = limits.device is not None
    needs, phase, terms, (process, own_phase) = host_peak(footprint, separate=separate)
    resources = [
        _resource("host memory", needs, limits.host, phase, terms),
        _resource("disk", footprint.disk_peak, limits.disk, None, {}),
    ]
    if separate:
        top = max(footprint.phases, key=device_bytes)
        if device_bytes(top):
            resources.insert(0, _resource("device memory", device_bytes(top), limits.device, top, top.device))
    tight = max(resources, key=lambda each: each["needs"] / each["has"] if each["has"] else 0.0)
    known = [each["fits"] for each in resources if each["fits"] is not None]
    fits = all(known) if known else None
    return {
        "verb": footprint.verb,
        "fits": fits,
        "limit": tight["resource"],
        "change": None if fits is not False else change(tight, footprint.verb),
        "resources": resources,
        "process_bytes": process,
        "process_phase": own_phase.name,
        "disk_kept": footprint.disk_kept,
        "operations": {
            "products": work.products,
            "float32": work.singles,
            "float64": work.doubles,
            "read": work.read,
            "written": work.written,
        },
        "at_least_seconds": None if speed is None else work.seconds(speed),
    }


def change(limiting: dict[str, Any], verb: str, *, streamed: bool = False) -> str:
    """What to change where ``limiting`` is too small; ``streamed``: although models are read layer by layer."""
    if limiting["resource"] == "disk":
        return "another --run folder, on a larger disk"
    phase = str(limiting["phase"])
    known = CHANGES.get(phase.removesuffix(AGAIN))
    helped = TRAINED if streamed else (*TRAINED, *SCORED)
    if known is not None and phase in helped and limiting["terms"].get("activations"):
        known = f"--recompute (gradient checkpointing); {known}"
    if known is not None and not (verb == "quantize" and limiting["phase"] == "score"):
        return known
    if verb == "quantize" and limiting["phase"] == "round" and len(limiting["terms"]) > 2:
        return "--objective frobenius, which loads no model"
    if verb == "eval" and limiting["terms"].get("reference"):
        return "--kl-windows 0, which leaves the comparison with the reference out"
    if verb == "eval" and limiting["terms"].get("logits", 0) > limiting["needs"] / 2:
        return "a shorter --sequence"
    if streamed:
        return "a larger machine, or a smaller model: no more than one layer is in memory here"
    return "a larger machine, or a smaller model: here a model is loaded whole"


def _resource(
    name: str, needs: float, has: int | None, phase: Phase | None, terms: Mapping[str, float]
) -> dict[str, Any]:
    return {
        "resource": name,
        "needs": needs,
        "has": has,
        "fits": None if has is None else needs <= has,
        "phase": None if phase is None else phase.name,
        "terms": {key: value for key, value in terms.items() if value},
    }
