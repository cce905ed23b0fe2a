"""The phases of a stage, and what all stages count alike: models loaded, scored, proved; activations of a layer.

Symbols as in `compress.pipelines.footprint`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod

from compress.evaluate.perplexity import CHUNK_ELEMENTS, windows_at_once
from compress.evaluate.training_memory import (
    HEAD_CHUNK,
    frozen_activation_bytes,
    layers_kept,
    training_memory,
)
from compress.model.architecture import Architecture
from compress.pipelines.hessian_walk import BATCH
from compress.pipelines.plan_models import PlannedModel
from compress.pipelines.settings import PruneSettings, TrainSettings

ROOM = 256 << 20
"""Bytes of hidden states that stay in memory where models are streamed."""
SHARD_BYTES = 2 << 30
"""A file being written lies twice on disk until it is closed, at most this much of it."""
AGAIN = ", recomputed"
"""Ends the name of a phase whose backward pass runs layers again because `--recompute` says so."""
Terms = Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """A part of a stage.

    Attributes:
        name: What is done.
        device: Bytes by term, where the model computes.
        host: Bytes by term, in the host's memory whatever computes.
        staging: Bytes in the host's memory of a model on its way to a device of its own.
        pages: Bytes of mapped files: resident, and given back when memory is short.
        beside: Bytes that a second process holds meanwhile, its libraries not counted.
    """

    name: str
    device: Terms = field(default_factory=dict)
    host: Terms = field(default_factory=dict)
    staging: float = 0.0
    pages: float = 0.0
    beside: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """A stage's phases, and what it needs on disk: at its peak, and for what it leaves."""

    verb: str
    phases: tuple[Phase, ...]
    disk_peak: float
    disk_kept: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Ground:
    """What all stages compute with.

    Attributes:
        itemsize: e.
        length: Tokens of a calibration or validation window.
        windows: Validation windows.
        streamed: Models that are run, not trained, are read layer by layer (`PlannedModel.streamed`).
        ahead: Streamed, the next layer is read meanwhile.
        workers: Matrices that are worked on at once.
    """

    itemsize: int
    length: int
    windows: int
    streamed: bool = False
    ahead: bool = True
    workers: int = 1


def held(model: PlannedModel, ground: Ground, itemsize: int | None = None) -> dict[str, float]:
    """Weights of a model that runs: ``packed + e (P - packed weights)``, or what a streamed one has of them."""
    size = ground.itemsize if itemsize is None else itemsize
    if ground.streamed:
        return model.streamed(size, ahead=ground.ahead)
    return {"weights": model.loaded(size)}


def loading(model: PlannedModel, ground: Ground, itemsize: int | None = None, *, name: str = "load") -> Phase:
    """Weights as they come to be: ``packed + e (P - packed weights)``, and beside them the mapped file.

    The file's pages count until it is closed: s P where numbers change their width on the way, else nothing, since
    then they are the weights. What is streamed is never mapped.
    """
    itemsize = ground.itemsize if itemsize is None else itemsize
    if ground.streamed:
        terms = held(model, ground, itemsize)
        return Phase(name=name, device=terms, staging=sum(terms.values()))
    weights = model.loaded(itemsize)
    stored = model.weight_bytes
    pages = 0.0 if abs(stored - weights) < 0.01 * stored else stored
    return Phase(name=name, device={"weights": weights}, staging=weights, pages=pages)


def scoring(model: PlannedModel, ground: Ground, *, length: int, windows: int, adapter: int = 0) -> Phase:
    """A perplexity: weights, ``T V e`` logits of `windows_at_once` with two float32 chunks, one layer.

    A layer takes ``T (3 C + 4 H) e``, an adapter 4 bytes a parameter, the largest quantized matrix while it is
    unpacked ``4 max(out in)``.
    """
    arch = model.arch
    tokens = min(windows_at_once(arch.vocab, length), windows) * length
    logits = ground.itemsize * tokens * arch.vocab + 8 * min(CHUNK_ELEMENTS, length * arch.vocab)
    return Phase(
        name="perplexity",
        device={
            **held(model, ground),
            "adapters": 4.0 * adapter,
            "logits": logits,
            "one layer": one_layer(arch, tokens, ground.itemsize) + unpacked(model),
        },
    )


def reopening(model: PlannedModel, ground: Ground, adapter: int = 0) -> tuple[Phase, ...]:
    """The check of what was written: float32 here, ``packed + 4 (P - packed weights)``, then in a fresh process."""
    weights = sum(held(model, ground, 4).values())
    return (
        loading(model, ground, 4, name="record logits"),
        Phase(name="reopen", beside=weights + 4 * adapter),
    )


def gradients(
    arch: Architecture, tokens: int, ground: Ground, *, recompute: bool = False
) -> dict[str, float]:
    """Bytes that a backward pass through frozen weights keeps; streamed, layers are run again in any case."""
    layers = [frozen_activation_bytes(arch.at(i), itemsize=ground.itemsize) for i in range(arch.layers)]
    kept = layers_kept(arch, layers, ground.itemsize, recompute=recompute or ground.streamed)
    return {"activations": float(tokens * kept), "loss": loss_bytes(arch, tokens)}


def hidden_states(arch: Architecture, windows: int, ground: Ground) -> float:
    """Bytes of hidden states in memory; of a batch there are two, before and behind a layer."""
    every = float(ground.itemsize * windows * ground.length * arch.hidden)
    batch = float(ground.itemsize * min(BATCH, windows) * ground.length * arch.hidden)
    return batch + (min(every, ROOM) if ground.streamed else every)


def spilled(arch: Architecture, windows: int, ground: Ground) -> float:
    """Bytes of hidden states that `ROOM` leaves for the disk."""
    every = float(ground.itemsize * windows * ground.length * arch.hidden)
    return max(0.0, every - ROOM) if ground.streamed else 0.0


def loss_bytes(arch: Architecture, tokens: int) -> float:
    """Bytes of a chunk of logits with its gradient, three float32 numbers each."""
    return 12.0 * min(HEAD_CHUNK, tokens) * arch.vocab


def one_layer(arch: Architecture, tokens: int, itemsize: int) -> float:
    """Bytes of a layer's activations in a forward pass, ``T (3 C + 4 H) e``."""
    widest = max(arch.at(i).channels for i in range(arch.layers))
    return float(itemsize * tokens * (3 * widest + 4 * arch.hidden))


def unpacked(model: PlannedModel) -> float:
    """Bytes of the largest quantized matrix as float32; 0 for a model that is not quantized."""
    arch = model.arch
    sizes = [prod(arch.at(i).linear_shape(s)) for i in range(arch.layers) for s in arch.linears_at(i)]
    return 0.0 if model.packed is None else 4.0 * max(sizes)


def largest(sizes: list[int], count: int) -> int:
    """The sum of the ``count`` largest ones."""
    return sum(sorted(sizes, reverse=True)[:count])


def training(
    name: str,
    model: PlannedModel,
    settings: PruneSettings | TrainSettings,
    itemsize: int,
    *,
    head: bool,
    rank: int | None = None,
) -> Phase:
    """A step of training adapters on a model that is whole; ``rank`` where it is not the settings' own."""
    parts = training_memory(
        model.arch,
        model.loaded(itemsize),
        quantized=model.packed is not None,
        rank=settings.rank if rank is None else rank,
        batch=settings.micro_batch,
        sequence=settings.sequence,
        head_adapter=head,
        dropout=rank is None and settings.dropout > 0,
        itemsize=itemsize,
        recompute=settings.recompute,
    )
    return Phase(
        name=name + AGAIN if settings.recompute else name,
        device={
            "weights": parts.weights,
            "adapters": parts.adapters + parts.gradients + parts.optimizer,
            "activations": parts.activations,
            "loss": parts.workspace,
        },
    )
