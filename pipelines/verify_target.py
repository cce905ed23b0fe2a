"""What ``compress verify`` looks at and what it finds: a chain as it lies on disk, one folder of it, findings."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from compress.errors import CompressError
from compress.pipelines.workspace import MODEL_VERBS, Stage, read_json

Result = Literal["ok", "differs", "not recorded", "not checked"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """The outcome of one check.

    Attributes:
        stage: Folder name of the stage, or the folder as it was given.
        check: What was looked at.
        result: ``ok``; ``differs``, the only one that is a failure; ``not recorded``: there is nothing to compare
            with; ``not checked``: what it takes is not here.
        detail: What was found, without a final stop.
        remedy: What to do about a failure, one sentence.
    """

    stage: str
    check: str
    result: Result
    detail: str
    remedy: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chain:
    """A workspace as it lies on disk, read without locking or changing it.

    Attributes:
        root: Its folder.
        names: Folder names of the stages, in order.
        stages: Those whose record can be read, by folder name.
        faults: Why the others cannot.
        model: The original model's ``name``, ``path`` and ``fingerprint``.
    """

    root: Path
    names: tuple[str, ...]
    stages: Mapping[str, Stage]
    faults: Mapping[str, CompressError]
    model: Mapping[str, Any]

    def find(self, verb: str) -> Stage | None:
        """The stage of ``verb``, if there is one."""
        return next((stage for stage in self.stages.values() if stage.verb == verb), None)

    def model_before(self, name: str) -> Stage | None:
        """The last stage with a model in front of the stage ``name``; None means the original model."""
        found = None
        for other in self.names[: self.names.index(name)]:
            if other in self.stages and self.stages[other].verb in MODEL_VERBS:
                found = self.stages[other]
        return found

    @property
    def original(self) -> Path | None:
        """The folder of the original model; None when it is not where it was."""
        path = Path(str(self.model.get("path", "")))
        return path if (path / "config.json").is_file() else None


def read_chain(root: Path) -> Chain:
    """The chain in ``root``; stages that cannot be read are among its ``faults``.

    Raises:
        CompressError: ``run.json`` cannot be read.
    """
    manifest = read_json(root / "run.json")
    names = tuple(str(name) for name in manifest.get("stages") or ())
    stages: dict[str, Stage] = {}
    faults: dict[str, CompressError] = {}
    for name in names:
        try:
            stages[name] = read_stage(root / name)
        except CompressError as error:
            faults[name] = error
    return Chain(root=root, names=names, stages=stages, faults=faults, model=manifest.get("model") or {})


def read_stage(folder: Path) -> Stage:
    """The stage in a folder.

    Raises:
        CompressError: Its record cannot be read or is not whole.
    """
    path = folder / "stage.json"
    record = read_json(path)
    absent = [key for key in ("verb", "id", "config", "inputs", "metrics") if key not in record]
    if absent:
        raise CompressError(f"{path} lacks {absent[0]!r}.", "Restore the file from a copy.")
    return Stage(path=folder, record=record)


@dataclass(frozen=True, slots=True, kw_only=True)
class Value:
    """A recorded value and the one that the artifact has now.

    Attributes:
        what: Its name in the message.
        recorded: None: not recorded.
        found: Recomputed.
        tolerance: Largest relative difference; 0: none.
        floor: Absolute difference that is rounding in any case, in the value's own unit.
    """

    what: str
    recorded: Any
    found: Any
    tolerance: float = 0.0
    floor: float = 0.0

    @property
    def agrees(self) -> bool:
        """Whether the two are the same."""
        if isinstance(self.recorded, int | float) and isinstance(self.found, int | float) and self.tolerance:
            return math.isclose(self.recorded, self.found, rel_tol=self.tolerance, abs_tol=self.floor)
        return bool(self.recorded == self.found)


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """One folder to verify.

    Attributes:
        name: How it is called in the findings.
        path: The folder.
        stage: Its record, when it is a stage.
        chain: The workspace that lists it, when there is one.
    """

    name: str
    path: Path
    stage: Stage | None = None
    chain: Chain | None = None

    @property
    def metrics(self) -> Mapping[str, Any]:
        """What the stage measured; nothing for a folder that is no stage."""
        found: Mapping[str, Any] = {} if self.stage is None else self.stage.record["metrics"]
        return found

    @property
    def source(self) -> Path | None:
        """The folder of the model that the stage worked on; None when it is not here."""
        if self.chain is None:
            return None
        before = self.chain.model_before(self.path.name)
        return self.chain.original if before is None else before.path

    @property
    def remedy(self) -> str:
        """What to do about an artifact that is not what was recorded."""
        if self.stage is None:
            return "Take the folder again from where it came."
        return f"Restore the folder from a copy, or make it again with compress {self.stage.verb} --redo."

    def ok(self, check: str, detail: str) -> Finding:
        """A check that holds."""
        return Finding(stage=self.name, check=check, result="ok", detail=detail)

    def differs(self, check: str, detail: str, remedy: str = "") -> Finding:
        """A check that fails."""
        return Finding(
            stage=self.name,
            check=check,
            result="differs",
            detail=detail.rstrip("."),
            remedy=remedy or self.remedy,
        )

    def not_recorded(self, check: str, detail: str) -> Finding:
        """A check without anything to compare with."""
        return Finding(stage=self.name, check=check, result="not recorded", detail=detail)

    def not_checked(self, check: str, detail: str) -> Finding:
        """A check for which something is not here."""
        return Finding(stage=self.name, check=check, result="not checked", detail=detail)

    def compare(self, check: str, values: Iterable[Value], summary: str) -> Iterator[Finding]:
        """One failure per value that differs; without any, one finding with ``summary``."""
        compared, failed = 0, False
        for value in values:
            if value.recorded is None:
                continue
            compared += 1
            if not value.agrees:
                failed = True
                yield self.differs(
                    check, f"{value.what}: {_text(value.recorded)} recorded, {_text(value.found)} on disk"
                )
        if not failed:
            yield self.ok(check, summary) if compared else self.not_recorded(check, "nothing to compare with")


def _text(value: Any) -> str:
    return f"{value:.9g}" if isinstance(value, float) else str(value)
