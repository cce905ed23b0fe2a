"""The methods of the pruning benchmark: how each one prunes, and how it is trained afterwards."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

PEER = "torch-pruning (taylor)"
PEER_MLP = "torch-pruning (taylor, channels only)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """One row of the table: how ``prune`` is set, and how recovery training is.

    Attributes:
        prune: Settings of ``prune`` without recovery training.
        recovery: Settings of recovery training.
        trained: Settings of ``prune`` when the method trains while it prunes; then there is no other recovery.
        recovers: Whether it is trained at all.
    """

    prune: Mapping[str, Any]
    recovery: Mapping[str, Any] = field(default_factory=lambda: {"repair_loss": "text"})
    trained: Mapping[str, Any] | None = None
    recovers: bool = True


PLAIN = {"repair": "none"}
METHODS: dict[str, Method] = {
    "random": Method(prune={"criterion": "random", **PLAIN}),
    "magnitude": Method(prune={"criterion": "magnitude", **PLAIN}),
    "taylor (vector)": Method(prune={"criterion": "taylor", "criterion_options": "form=vector", **PLAIN}),
    "taylor (element)": Method(prune={"criterion": "taylor", "criterion_options": "form=element", **PLAIN}),
    "wanda-sp": Method(prune={"criterion": "wanda", **PLAIN}),
    "wanda-sp (o and down)": Method(
        prune={"criterion": "wanda", "criterion_options": "linears=outputs", **PLAIN}
    ),
    "flap": Method(prune={"criterion": "flap", "repair": "bias"}),
    PEER: Method(prune={}),
    PEER_MLP: Method(prune={}),
    "loraprune": Method(
        prune={"criterion": "lora", "one_shot": True, **PLAIN},
        trained={"criterion": "lora", "repair": "lora", "lr": 1e-3, "rank": 8, "alpha": 16, "dropout": 0.05},
    ),
    "ours": Method(prune={"criterion": "obs", "repair": "refit"}),
    "ours, distilled": Method(
        prune={"criterion": "obs", "repair": "refit"}, recovery={"repair_loss": "both"}
    ),
    "ours, distilled only": Method(
        prune={"criterion": "obs", "repair": "refit"}, recovery={"repair_loss": "distill"}
    ),
    "ours, distilled, features": Method(
        prune={"criterion": "obs", "repair": "refit"},
        recovery={"repair_loss": "both", "repair_features": 1.0},
    ),
    "ours, allocated": Method(prune={"criterion": "obs", "repair": "refit", "shape": "allocated"}),
    "wanda-sp (o and down) + refit": Method(
        prune={"criterion": "wanda", "criterion_options": "linears=outputs", "repair": "refit"},
        recovers=False,
    ),
    "loraprune + refit": Method(
        prune={"criterion": "lora", "one_shot": True, "repair": "refit"}, recovers=False
    ),
    "ours without refit": Method(prune={"criterion": "obs", **PLAIN}, recovers=False),
    "ours, two rounds": Method(
        prune={"criterion": "obs", "repair": "refit", "rounds": 2},
        trained={"criterion": "obs", "repair": "refit", "rounds": 2, "repair_loss": "text"},
    ),
}
