"""Settings of the verbs: what the user gave, over what the effort implies, over the defaults."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, TypeVar, get_type_hints

from compress.errors import UsageError
from compress.pipelines.setting_values import (
    as_type,
    check_effort,
    check_least,
    check_name,
    check_positive,
)

DEFAULT_RUN = Path("compress-run")


class _Settings(Protocol):
    """The settings of a verb.

    Attributes:
        EFFORT: What an effort gives other than the defaults.
    """

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]
    EFFORT: ClassVar[dict[str, dict[str, Any]]]


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
    memory_limit: str | None = None
    engine: str = "local"

    def __post_init__(self) -> None:
        if self.effort is not None:
            check_effort(self.effort)
        check_least(self, seed=0, threads=1)
        if self.seed >= 2**63:
            raise UsageError(f"--seed {self.seed} is too large.", "Give less than 2^63.")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopSettings:
    """How training runs, whatever it trains; part of several verbs."""

    steps: int
    micro_batch: int
    accumulation: int
    sequence: int
    lr: float
    recompute: bool = False

    def __post_init__(self) -> None:
        check_least(self, steps=0, micro_batch=1, accumulation=1, sequence=2)
        check_positive(self, "lr")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingSettings(LoopSettings):
    """How adapter training runs; part of several verbs."""

    rank: int = 8
    alpha: int = 16
    dropout: float = 0.05

    def __post_init__(self) -> None:
        LoopSettings.__post_init__(self)
        check_least(self, rank=1, alpha=1)
        if not 0 <= self.dropout < 1:
            raise UsageError(f"--dropout {self.dropout} is not in [0, 1).", "Give a fraction such as 0.05.")


@dataclass(frozen=True, slots=True, kw_only=True)
class PruneSettings(TrainingSettings):
    """Settings of ``prune``: how much, which groups, and repair of what is left.

    ``steps``, ``lr``, ``rank``, ``alpha`` and ``dropout`` are those of the training in which the criterion ``lora``
    scores, or in which any criterion's masks close when ``repair`` is ``lora``. The effort ``paper`` has LoRAPrune's
    own values (arXiv 2305.18403 §4): local shapes, the adapter that scored is folded in, no other repair.
    """

    ratio: float | None = None
    params: str | None = None
    size: str | None = None
    criterion: str = "obs"
    criterion_options: str = ""
    targets: str = "heads,mlp"
    head_unit: Literal["auto", "group", "query"] = "auto"
    shape: Literal["uniform", "local", "global", "allocated", "semi", "unstructured"] = "uniform"
    pattern: str = "4:8"
    multiple: int | None = None
    trials: int = 4
    skip_first: int | None = None
    skip_last: int = 1
    ratio_of: Literal["model", "layers", "parts"] = "model"
    solver: str = "highs"
    one_shot: bool = False
    int8: bool = False
    calibration_tokens: int
    repair: Literal["refit", "bias", "lora", "none"] = "refit"
    repair_steps: int = 0
    repair_lr: float = 2e-3
    repair_rank: int = 16
    repair_loss: Literal["distill", "text", "both"] = "distill"
    repair_features: float = 0.0
    rounds: int = 1

    def __post_init__(self) -> None:
        TrainingSettings.__post_init__(self)
        check_least(
            self,
            trials=1,
            multiple=1,
            calibration_tokens=1,
            repair_steps=0,
            repair_rank=1,
            rounds=1,
            skip_first=0,
            skip_last=0,
        )
        check_positive(self, "repair_lr")
        given = [f"--{name}" for name in ("ratio", "params", "size") if getattr(self, name) is not None]
        if len(given) > 1:
            raise UsageError(f"{' and '.join(given)} are given together.", "Give one of them.")
        if self.ratio is not None and not 0 < self.ratio < 1:
            raise UsageError(
                f"--ratio {self.ratio} is not between 0 and 1.", "Give the fraction to remove, such as 0.5."
            )
        if not 0 <= self.repair_features < math.inf:
            raise UsageError(
                f"--repair-features {self.repair_features} is no weight.", "Give 0 or more, such as 0.1."
            )
        if self.repair_features > 0 and self.repair_loss == "text":
            raise UsageError(
                "--repair-features compares with the full model, and --repair-loss text does not.",
                "Give --repair-loss distill or both.",
            )
        if self.rounds > 1 and (self.shape != "uniform" or self.repair == "bias"):
            raise UsageError(
                f"Pruning in {self.rounds} rounds needs plain models in between.",
                "Give --shape uniform and another repair than bias, or --rounds 1.",
            )

    EFFORT: ClassVar[dict[str, dict[str, Any]]] = {
        "quick": {
            "steps": 24,
            "micro_batch": 4,
            "accumulation": 1,
            "sequence": 128,
            "lr": 1e-3,
            "dropout": 0.0,
            "calibration_tokens": 16_384,
            "repair_steps": 40,
        },
        "standard": {
            "steps": 200,
            "micro_batch": 4,
            "accumulation": 4,
            "sequence": 512,
            "lr": 3e-4,
            "calibration_tokens": 131_072,
            "repair_steps": 400,
            "repair_lr": 5e-4,
        },
        "paper": {
            "criterion": "lora",
            "shape": "local",
            "ratio_of": "layers",
            "head_unit": "group",
            "steps": 1600,
            "micro_batch": 2,
            "accumulation": 64,
            "sequence": 512,
            "lr": 1e-4,
            "calibration_tokens": 131_072,
            "repair": "lora",
        },
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class AlignSettings(LoopSettings):
    """Settings of ``align``; under the effort ``paper`` those of LoRAM (arXiv 2502.13533) §4: about 105 M tokens."""

    loss: Literal["text", "distill", "both"] = "text"
    optimizer: Literal["adamw", "galore"] = "adamw"

    EFFORT: ClassVar[dict[str, dict[str, Any]]] = {
        "quick": {"steps": 40, "micro_batch": 4, "accumulation": 1, "sequence": 128, "lr": 1e-4},
        "standard": {"steps": 400, "micro_batch": 4, "accumulation": 4, "sequence": 512, "lr": 5e-5},
        "paper": {"steps": 1600, "micro_batch": 2, "accumulation": 64, "sequence": 512, "lr": 5e-5},
    }

    def __post_init__(self) -> None:
        check_least(self, steps=1)
        LoopSettings.__post_init__(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizeSettings:
    """Settings of ``quantize``. The effort ``paper`` is LQ-LoRA without data (arXiv 2311.12023 §3).

    The paper's other objective, ``fisher``, reads far more text than the others; the recipe ``lq-lora`` has it.
    """

    budget: str = "2.75bit"
    budget_includes: Literal["factors", "none"] = "factors"
    rank: str = "auto"
    factors: Literal["8bit", "16bit"] = "8bit"
    embeddings: Literal["keep", "8bit", "menu"] = "keep"
    runtime: Literal["any", "vllm"] = "any"
    solver: str = "highs"
    objective: Literal["hessian", "fisher", "frobenius"] = "hessian"
    calibration_tokens: int
    iterations: int
    menu: Literal["quick", "standard", "paper"]

    def __post_init__(self) -> None:
        check_least(self, iterations=1, calibration_tokens=1)
        if self.embeddings == "menu" and self.objective == "fisher":
            raise UsageError(
                "The objective fisher knows of decoder matrices alone, so it cannot compare embeddings with them.",
                "Use --embeddings 8bit, or the objective hessian.",
            )

    EFFORT: ClassVar[dict[str, dict[str, Any]]] = {
        "quick": {"calibration_tokens": 8192, "iterations": 5, "menu": "quick"},
        "standard": {"calibration_tokens": 65_536, "iterations": 10, "menu": "standard"},
        "paper": {"calibration_tokens": 65_536, "iterations": 100, "menu": "paper", "objective": "frobenius"},
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainSettings(TrainingSettings):
    """Settings of ``train``; under the effort ``paper`` those of LoRAM (arXiv 2502.13533) §4."""

    method: Literal["lora", "lq", "pissa"] = "lora"
    adapter_targets: str = "all"
    rslora: bool = False

    EFFORT: ClassVar[dict[str, dict[str, Any]]] = {
        "quick": {
            "steps": 40,
            "micro_batch": 4,
            "accumulation": 1,
            "sequence": 128,
            "lr": 3e-4,
            "dropout": 0.0,
        },
        "standard": {"steps": 400, "micro_batch": 4, "accumulation": 4, "sequence": 512, "lr": 3e-4},
        "paper": {
            "steps": 1600,
            "micro_batch": 2,
            "accumulation": 64,
            "sequence": 512,
            "lr": 3e-4,
            "adapter_targets": "all,lm_head",
        },
    }

    def __post_init__(self) -> None:
        check_least(self, steps=1)
        TrainingSettings.__post_init__(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class RecoverSettings:
    """Settings of ``recover``."""

    onto: str | None = None
    adapter: str | None = None
    merge: bool = False
    compress_rank: int | None = None

    def __post_init__(self) -> None:
        check_least(self, compress_rank=1)

    EFFORT: ClassVar[dict[str, dict[str, Any]]] = {}


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalSettings:
    """Settings of ``eval``."""

    sequence: int = 512
    windows: int
    reference: str | None = None
    kl_windows: int
    bos: bool = False
    task: tuple[str, ...] = ()
    task_rows: int | None = None
    task_delimiter: str = " "
    lm_eval: str | None = None
    lm_eval_tasks: str | None = None
    speed: Literal["none", "quick", "full"] = "quick"

    def __post_init__(self) -> None:
        check_least(self, sequence=2, windows=1, kl_windows=0, task_rows=1)
        if self.lm_eval_tasks is not None and self.lm_eval is None:
            raise UsageError(
                "--lm-eval-tasks names a folder of tasks, and no task is asked for.",
                "Name them with --lm-eval.",
            )

    EFFORT: ClassVar[dict[str, dict[str, Any]]] = {
        "quick": {"windows": 12, "kl_windows": 4},
        "standard": {"windows": 200, "kl_windows": 50},
        "paper": {"windows": 100_000, "kl_windows": 100_000},
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanSettings:
    """Settings of ``plan``, which makes no stage: options of the stages, None where they are not asked for."""

    model: str | None = None
    ratio: float | None = None
    params: str | None = None
    size: str | None = None
    targets: str | None = None
    head_unit: str | None = None
    multiple: int | None = None
    align: bool = False
    budget: str | None = None
    budget_includes: str | None = None
    rank: str | None = None
    factors: str | None = None
    embeddings: str | None = None
    objective: str | None = None
    calibration_tokens: int | None = None
    train_rank: int | None = None
    micro_batch: int | None = None
    sequence: int | None = None
    recompute: bool = False
    memory: str | None = None
    no_time: bool = False
    merge: bool = False
    loram: bool = False
    ratios: str = "0.65,0.75,0.85,0.95"
    skip_first: int = 4
    skip_last: int = 2
    check: bool = False

    def __post_init__(self) -> None:
        check_least(self, skip_first=0, skip_last=0, train_rank=1, micro_batch=1, sequence=2)
        check_least(self, calibration_tokens=1, multiple=1)
        for name in ("ratios", "skip_first", "skip_last"):
            if not self.loram and getattr(self, name) != type(self).__dataclass_fields__[name].default:
                raise UsageError(f"--{name.replace('_', '-')} is about --loram.", "Give --loram too.")

    EFFORT: ClassVar[dict[str, dict[str, Any]]] = {}


S = TypeVar("S", bound=_Settings)
VERBS: dict[str, type] = {
    "prune": PruneSettings,
    "align": AlignSettings,
    "quantize": QuantizeSettings,
    "train": TrainSettings,
    "recover": RecoverSettings,
    "eval": EvalSettings,
}


def resolve(kind: type[S], given: Mapping[str, Any], effort: str) -> S:
    """Settings of one verb: given values first, then the effort's, then the defaults.

    Raises:
        UsageError: An unknown effort; an unknown setting (the nearest known name is suggested); a value of
            another type, outside its range or not among the choices.
    """
    check_effort(effort)
    types = get_type_hints(kind)
    known = [field.name for field in dataclasses.fields(kind)]
    for name in given:
        check_name(name, known)
    chosen = {name: as_type(name, value, types[name]) for name, value in given.items() if value is not None}
    return kind(**{**kind.EFFORT.get(effort, {}), **chosen})
