"""Settings of the verbs that make no stage: ``generate``, ``export``, ``init``."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from compress.errors import UsageError
from compress.pipelines.setting_values import check_least


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateSettings:
    """Settings of ``generate``, which makes no stage and has no effort."""

    prompt: str
    models: str | None = None
    tokens: int = 64
    temperature: float = 0.0
    chat: bool | None = None

    def __post_init__(self) -> None:
        check_least(self, tokens=1)
        if not 0 <= self.temperature < math.inf:
            raise UsageError(
                f"--temperature {self.temperature} is no temperature.",
                "Give 0 for the likeliest token, or more to draw.",
            )

    EFFORT: ClassVar[dict[str, dict[str, Any]]] = {}


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportSettings:
    """Settings of ``export``, which makes no stage and has no effort."""

    what: str | None = None
    format: Literal["native", "dense", "packed"] = "native"
    out: str | None = None
    force: bool = False
    push: str | None = None
    private: bool = False

    def __post_init__(self) -> None:
        if self.private and self.push is None:
            raise UsageError("--private is about an upload, and there is none.", "Give --push too.")

    EFFORT: ClassVar[dict[str, dict[str, Any]]] = {}


@dataclass(frozen=True, slots=True, kw_only=True)
class InitSettings:
    """Settings of ``init``."""

    model: str | None = None
    out: str = "recipe.yaml"
    force: bool = False

    EFFORT: ClassVar[dict[str, dict[str, Any]]] = {}
