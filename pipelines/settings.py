"""Settings of the verbs: what the user gave, over what the effort implies, over the defaults."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

from compress.errors import UsageError

DEFAULT_RUN = Path("compress-run")
EFFORTS = ("quick", "standard", "paper")


@dataclass(frozen=True, slots=True, kw_only=True)
class Common:
    """Options that mean the same to every verb."""

    run: Path = DEFAULT_RUN
    model: str | None = None
    data: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    seed: int = 0
    threads: int | None = None
    effort: str | None = None
    redo: bool = False
    dry_run: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingSettings:
    """How adapter training runs; part of several verbs."""

    steps: int
    micro_batch: int
    accumulation: int
    sequence: int
    lr: float
    rank: int = 8
    alpha: int = 16
    dropout: float = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class PruneSettings(TrainingSettings):
    """Settings of ``prune``: scoring while the masks close, then repair of what is left.

    The effort ``paper`` has LoRAPrune's own values (arXiv 2305.18403 §4): the adapter that scored is folded in
    and there is no other repair.
    """

    ratio: float = 0.5
    criterion: str = "lora"
    targets: str = "heads,mlp"
    multiple: int | None = None
    repair: Literal["refit", "lora"] = "refit"
    refit_tokens: int = 8192
    repair_steps: int = 0
    repair_lr: float = 2e-3
    repair_rank: int = 16

    EFFORT: ClassVar[dict[str, dict[str, Any]]] = {
        "quick": {
            "steps": 24,
            "micro_batch": 4,
            "accumulation": 1,
            "sequence": 128,
            "lr": 1e-3,
            "repair_steps": 40,
        },
        "standard": {
            "steps": 200,
            "micro_batch": 4,
            "accumulation": 4,
            "sequence": 512,
            "lr": 3e-4,
            "refit_tokens": 131_072,
            "repair_steps": 400,
            "repair_lr": 5e-4,
        },
        "paper": {
            "steps": 1600,
            "micro_batch": 2,
            "accumulation": 64,
            "sequence": 512,
            "lr": 1e-4,
            "repair": "lora",
        },
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizeSettings:
    """Settings of ``quantize``."""

    budget: str = "2.75bit"
    budget_includes: str = "factors"
    rank: str = "auto"
    solver: str = "highs"
    iterations: int
    menu: Literal["quick", "standard", "paper"]

    EFFORT: ClassVar[dict[str, dict[str, Any]]] = {
        "quick": {"iterations": 5, "menu": "quick"},
        "standard": {"iterations": 10, "menu": "standard"},
        "paper": {"iterations": 100, "menu": "paper"},
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainSettings(TrainingSettings):
    """Settings of ``train`` (LoRAM §4 under the effort ``paper``)."""

    method: str = "lora"

    EFFORT: ClassVar[dict[str, dict[str, Any]]] = {
        "quick": {"steps": 40, "micro_batch": 4, "accumulation": 1, "sequence": 128, "lr": 3e-4},
        "standard": {"steps": 400, "micro_batch": 4, "accumulation": 4, "sequence": 512, "lr": 3e-4},
        "paper": {"steps": 1600, "micro_batch": 2, "accumulation": 64, "sequence": 512, "lr": 3e-4},
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class RecoverSettings:
    """Settings of ``recover``."""

    onto: str | None = None
    merge: bool = False
    compress_rank: int | None = None

    EFFORT: ClassVar[dict[str, dict[str, Any]]] = {}


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalSettings:
    """Settings of ``eval``."""

    sequence: int = 512
    windows: int

    EFFORT: ClassVar[dict[str, dict[str, Any]]] = {
        "quick": {"windows": 20},
        "standard": {"windows": 200},
        "paper": {"windows": 100_000},
    }


S = TypeVar("S", PruneSettings, QuantizeSettings, TrainSettings, RecoverSettings, EvalSettings)

VERBS: dict[str, type] = {
    "prune": PruneSettings,
    "quantize": QuantizeSettings,
    "train": TrainSettings,
    "recover": RecoverSettings,
    "eval": EvalSettings,
}


def resolve(kind: type[S], given: Mapping[str, Any], effort: str) -> S:
    """Settings of one verb: given values first, then the effort's, then the defaults.

    Raises:
        UsageError: An unknown effort or an unknown setting; the nearest known name is suggested.
    """
    if effort not in EFFORTS:
        raise UsageError(f"There is no effort {effort!r}.", f"Choose one of: {', '.join(EFFORTS)}.")
    known = [field.name for field in dataclasses.fields(kind)]
    for name in given:
        check_name(name, known)
    values = {**kind.EFFORT.get(effort, {}), **{k: v for k, v in given.items() if v is not None}}
    return kind(**values)


def check_name(name: str, known: list[str]) -> None:
    """Refuse a setting nobody knows.

    Raises:
        UsageError: ``name`` is not in ``known``.
    """
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"Did you mean {near[0]!r}?" if near else f"Known settings: {', '.join(known)}."
        raise UsageError(f"There is no setting {name!r} here.", hint)
