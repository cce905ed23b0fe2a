"""What ``prune`` holds at its peak, in memory and on disk, counted from what it does.

Symbols as in `compress.pipelines.footprint`; K kept columns of a matrix, A parameters of an adapter.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import prod

from compress.evaluate.training_memory import (
    HEAD_CHUNK,
    activation_bytes,
    adapter_parameters,
    layers_kept,
)
from compress.importance import CRITERIA
from compress.importance.gram_store import fits
from compress.importance.moments import OUTPUTS, SKETCH_ROWS
from compress.model.architecture import Architecture
from compress.pipelines.hessian_walk import BATCH
from compress.pipelines.phase import (
    AGAIN,
    SHARD_BYTES,
    Footprint,
    Ground,
    Phase,
    gradients,
    held,
    hidden_states,
    loading,
    loss_bytes,
    one_layer,
    reopening,
    scoring,
    spilled,
    training,
)
from compress.pipelines.plan_models import PlannedModel
from compress.pipelines.settings import PruneSettings
from compress.prune.compensate import REFITS

NOTHING: Mapping[str, float] = {}


def prune_footprint(
    full: PlannedModel, small: PlannedModel, settings: PruneSettings, ground: Ground
) -> Footprint:
    """``prune``: the full model, scored; the repair of o and down; the small model, trained beside the full one.

    Scoring by moments (``obs``): ``T (8 H + 2 e (Q + KV) + 3 e C)`` activations a layer for the gradients of a
    window; ``8 L H^2`` curvature at the outputs (``8 L 1024 H`` for hidden sizes above 1024); hidden states
    of all calibration windows, ``N H e``; ``48 (Q^2 + C^2)`` second moments of a layer's inputs and their inverses,
    ``24 min(H, 1024) (Q + C)`` roots times weights. ``gradients`` hold ``e W``. Training while it scores is that of
    ``train``. An allocation by any other criterion measures costs in the same way, beside the model that was scored
    or is being trained.
    Refit: hidden states and ``12 (Q^2 + C^2)`` moments of a layer where scoring has not left them; then
    ``4 L H (Q + C)`` new weights, and ``8 (H C + 1.5 C K + 2 K^2 + 2 H K)`` of each of two systems, ``4 C^2`` being
    read. Where the moments are too large for the disk, one system beside the model. While shapes are tried
    ``e L H (Q + C)`` more in the model. Repair ``bias``: hidden states.
    Streamed, or with ``recompute``, backward keeps the inputs of the layers and the activations of one of them.
    Streamed, hidden states beyond `ROOM` go to disk, and so do the new weights.
    Repair: as ``train``, with the full model (e P) and four float32 chunks of logits when it distils.
    Disk: see `_disk`.
    """
    e, count = ground.itemsize, max(1, settings.calibration_tokens // ground.length)
    phases = _scoring(full, settings, ground, count)
    phases += _statistics(full, small, settings, ground, count)
    if settings.repair_steps > 0:
        repair = training("repair", small, settings, e, head=False, rank=settings.repair_rank)
        extra: dict[str, float] = {}
        if settings.repair_loss != "text":
            chunk = 16.0 * min(HEAD_CHUNK, settings.micro_batch * settings.sequence) * full.arch.vocab
            extra = {"teacher": full.loaded(e), "teacher's logits": chunk}
        phases.append(Phase(name=repair.name, device={**repair.device, **extra}))
    phases.append(scoring(full, ground, length=ground.length, windows=ground.windows))
    phases += reopening(small, ground)
    return Footprint(
        verb="prune",
        phases=tuple(phases),
        disk_peak=_disk(full, small, settings, ground, count),
        disk_kept=small.file_bytes,
    )


def _trains(settings: PruneSettings) -> bool:
    """Whether an adapter is trained while groups are scored."""
    return CRITERIA.get(settings.criterion).needs == "adapters" or settings.repair == "lora"


def _scoring(full: PlannedModel, settings: PruneSettings, ground: Ground, count: int) -> list[Phase]:
    """From the model that is loaded to the shapes, but for trials of them."""
    arch, e, tokens = full.arch, ground.itemsize, min(BATCH, count) * ground.length
    needs, trains = CRITERIA.get(settings.criterion).needs, _trains(settings)
    here = replace(ground, streamed=False) if trains or needs == "gradients" else ground
    model = held(full, here)
    phases = [loading(full, here)]
    if needs == "moments":
        phases += _curvature(full, settings, ground, here, count, NOTHING, ("output gradients", "score"))
    elif needs == "gradients":
        layers = [activation_bytes(arch.at(i), 0, dropout=False, itemsize=e) for i in range(arch.layers)]
        kept = tokens * layers_kept(arch, layers, e, recompute=settings.recompute)
        name = "score" + AGAIN if settings.recompute else "score"
        terms = {"gradients": float(e * full.linears), "activations": float(kept), **model}
        phases.append(Phase(name=name, device=terms | {"loss": loss_bytes(arch, tokens)}))
    elif needs != "adapters":
        phases.append(Phase(name="score", device={**model, "one layer": one_layer(arch, tokens, e)}))
    beside = {"the model that was scored": sum(model.values())}
    if trains:
        masked = training("score and mask", full, settings, e, head=False)
        phases.append(masked)
        beside = {f"{name} in training": masked.device[name] for name in ("weights", "adapters")}
    if settings.shape == "allocated" and needs != "moments":
        names = ("gradients of costs", "measure costs")
        phases += _curvature(full, settings, ground, ground, count, beside, names)
    return phases


def _curvature(
    full: PlannedModel,
    settings: PruneSettings,
    ground: Ground,
    here: Ground,
    count: int,
    beside: Mapping[str, float],
    names: tuple[str, str],
) -> list[Phase]:
    """Ranking by moments: backward passes, then layer after layer; ``here``: how the model is opened."""
    arch, e, tokens = full.arch, ground.itemsize, min(BATCH, count) * ground.length
    rows = min(arch.hidden, SKETCH_ROWS)
    sums = {**held(full, here), "output curvature": 8.0 * arch.layers * rows * arch.hidden, **beside}
    widths = _widths(arch)
    moments = 8.0 * sum(width**2 for width in widths)
    inverse = sum(40.0 * width**2 + 24.0 * rows * width for width in widths)
    return [
        Phase(
            name=names[0] + AGAIN if settings.recompute else names[0],
            device={**sums, **gradients(arch, ground.length, here, recompute=settings.recompute)},
        ),
        Phase(
            name=names[1],
            device={
                **sums,
                "hidden states": hidden_states(arch, count, here),
                "input moments": moments + inverse,
                "one layer": one_layer(arch, tokens, e),
            },
        ),
    ]


def _statistics(
    full: PlannedModel, small: PlannedModel, settings: PruneSettings, ground: Ground, count: int
) -> list[Phase]:
    """The repair without training, for every shape that is tried and for the cut."""
    arch, e, tokens = full.arch, ground.itemsize, min(BATCH, count) * ground.length
    walk = {
        **held(full, ground),
        "hidden states": hidden_states(arch, count, ground),
        "one layer": one_layer(arch, tokens, e),
    }
    solved: dict[str, float] = {}
    changed = 0
    phases: list[Phase] = []
    if settings.repair == "bias":
        phases.append(Phase(name="mean inputs", device=walk))
    elif settings.repair == "refit":
        changed, system = _refitted(arch, small.arch)
        if ground.streamed:
            changed = _widest_output(arch)
        weights = {"refitted weights": 4.0 * changed}
        squares = [float(width * width) for width in _widths(arch)]
        if not fits(arch, OUTPUTS):
            moments = {"input moments": 8.0 * sum(squares), "least squares": system}
            phases.append(Phase(name="refit", device={**walk, **moments}, host=weights))
            solved = weights
        else:
            if CRITERIA.get(settings.criterion).needs != "moments":
                moments = {"input moments": 12.0 * sum(squares)}
                phases.append(Phase(name="moments of inputs", device={**walk, **moments}))
            solved = {**weights, "least squares": REFITS * system + 4.0 * max(squares)}
            phases.append(Phase(name="refit", host=solved))
    if settings.trials > 1 and (settings.one_shot or not _trains(settings)):
        tried = scoring(full, ground, length=ground.length, windows=count).device
        on_trial = {"shape on trial": float(e * changed)} if changed else {}
        phases.append(Phase(name="try shapes", device={**tried, **on_trial}, host=solved))
    return phases


def _disk(
    full: PlannedModel, small: PlannedModel, settings: PruneSettings, ground: Ground, count: int
) -> float:
    """Bytes on disk at the peak, with what is kept for a run that goes on after an interruption.

    Before the cut: moments ``4 L (Q^2 + C^2)``, curvature at the outputs ``8 L H min(H, 1024)``, the scoring adapter
    with its state, twice while it is replaced, ``24 A``; refitted weights, their kept columns in ``4 L H K`` and,
    streamed, whole; hidden states beyond `ROOM`. Then the cut, and what is trained from it or copied of it, its last
    shard twice, with ``24 A`` for the states of the repair. Every earlier round has left both, larger than the
    last, and ``16 A``, its repair with its state.
    """
    arch, rounds = full.arch, settings.rounds
    needs = CRITERIA.get(settings.criterion).needs
    kept = spilled(arch, count, ground)
    if needs == "moments" or settings.shape == "allocated":
        kept += 8.0 * arch.layers * arch.hidden * min(arch.hidden, SKETCH_ROWS)
    if _trains(settings):
        kept += 24.0 * adapter_parameters(arch, settings.rank, head=False)
    if settings.repair == "refit":
        kept += _moments(arch) if fits(arch, OUTPUTS) else 0.0
        kept += 4.0 * _kept_columns(arch, small.arch)
        kept += 4.0 * _refitted(arch, small.arch)[0] if ground.streamed else 0.0
    size, shard, stored, left = small.file_bytes, min(SHARD_BYTES, small.file_bytes), 0.0, 0.0
    trained = 2.0 * size
    if settings.repair_steps > 0:
        adapter = float(adapter_parameters(small.arch, settings.repair_rank, head=False))
        if rounds > 1:  # those of earlier rounds are on larger models
            left = 16.0 * adapter_parameters(arch, settings.repair_rank, head=False)
        stored, trained = 24.0 * adapter, trained + shard
    before = sum(2.0 * size_after(full, small, number / rounds) + left for number in range(1, rounds))
    return max(kept + size + shard, stored + trained) + before


def size_after(full: PlannedModel, small: PlannedModel, share: float) -> float:
    """Bytes of the model after a share of the rounds: each removes the same share of what the one before it left."""
    kept = small.linears / full.linears
    if kept == 1:
        return float(full.file_bytes)
    removed = (1 - kept**share) / (1 - kept)
    return float(full.file_bytes - (full.file_bytes - small.file_bytes) * removed)


def _widths(arch: Architecture) -> tuple[int, int]:
    """Input widths of o and down."""
    return arch.heads * arch.head_dim, arch.channels


def _widest_output(arch: Architecture) -> int:
    """Weights of the largest matrix that can be refitted."""
    return max(
        prod(arch.at(i).linear_shape(spec))
        for i in range(arch.layers)
        for spec in arch.linears_at(i)
        if spec.role in OUTPUTS
    )


def _moments(arch: Architecture) -> float:
    widths = [arch.linear_shape(spec)[1] for spec in arch.linears if spec.role in OUTPUTS]
    return 4.0 * arch.layers * sum(width * width for width in widths)


def _kept_columns(arch: Architecture, small: Architecture) -> int:
    """Weights that stay of those o and down that lose columns."""
    pairs = (
        (arch.linear_shape(spec)[1], small.at(layer).linear_shape(spec)[1])
        for layer in range(arch.layers)
        for spec in arch.linears_at(layer)
        if spec.role in OUTPUTS
    )
    return sum(arch.hidden * kept for width, kept in pairs if kept < width)


def _refitted(arch: Architecture, small: Architecture) -> tuple[int, float]:
    """Weights of o and down that lose columns, and bytes of the largest system that refits one of them."""
    changed, system = 0, 0.0
    for layer in range(arch.layers):
        for spec in arch.linears_at(layer):
            if spec.role not in OUTPUTS:
                continue
            (rows, columns), kept = arch.linear_shape(spec), small.at(layer).linear_shape(spec)[1]
            if kept < columns:
                changed += rows * columns
                inputs = 1.5 * columns * kept + 2 * kept * kept
                system = max(system, 8.0 * (rows * columns + inputs + 2 * rows * kept))
    return changed, system
