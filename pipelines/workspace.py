"""The workspace: a chain of stages on disk, complete or absent, never half-written.

``run.json`` names the original model and lists the finished stages in order. A stage is a folder
``NN-verb`` that appears by one rename when it is complete; until then its work lies in
``NN-verb.partial`` and the same command goes on from there.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from compress.errors import CompressError, UsageError, nearest

FORMAT_VERSION = 1
MODEL_VERBS = ("prune", "align", "quantize")
"""Verbs whose artifact is a model that the next verb takes as its input."""
MEASUREMENTS = ("eval",)
"""Verbs that only measure: a newer one replaces the older without being asked to."""


_REMAINS = (".lock", "run.json.tmp")
"""What a run leaves that was killed before its workspace came to be."""


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as JSON, durably: a reader sees the old file or the new one, never half of one."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            json.dump(value, file, indent=2, sort_keys=True, ensure_ascii=False, default=str)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _settle(folder: Path) -> None:
    """Have the disk hold every file below a folder, before a rename says that it is complete."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("r+b") as file:
                os.fsync(file.fileno())


def read_json(path: Path) -> dict[str, Any]:
    """Read one of our JSON objects.

    Raises:
        CompressError: The file is missing, is no JSON object, or was written by a newer format.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CompressError(
            f"{path} cannot be read ({error}).", "Remove the workspace, or use another one with --run."
        ) from error
    if not isinstance(value, dict) or int(value.get("format_version", 0)) > FORMAT_VERSION:
        raise CompressError(
            f"{path} was written in a format this version does not know.",
            "Upgrade compress, or use another --run.",
        )
    return value


def digest(value: Any) -> str:
    """Sha256 of a JSON value in canonical form."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One finished stage: its folder and its record (``stage.json``)."""

    path: Path
    record: Mapping[str, Any]

    @property
    def verb(self) -> str:
        """The verb that made it."""
        return str(self.record["verb"])

    @property
    def id(self) -> str:
        """Sha256 over verb, configuration and the identities of its inputs."""
        return str(self.record["id"])


def record_digest(record: Mapping[str, Any]) -> str:
    """Sha256 of a stage's record as it reads from disk, but for ``record_sha256``, which holds the result."""
    plain = json.loads(json.dumps(record, default=str))
    return digest({key: value for key, value in plain.items() if key != "record_sha256"})


def stage_id(verb: str, config: Mapping[str, Any], inputs: Mapping[str, str]) -> str:
    """The identity of the stage that ``verb`` would make of these inputs."""
    return digest({"verb": verb, "config": config, "inputs": inputs})


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """The settings that differ, as ``name: old -> new`` joined by commas."""
    keys = sorted({*old, *new})
    absent = "unset"
    return ", ".join(
        f"{key}: {old.get(key, absent)} -> {new.get(key, absent)}"
        for key in keys
        if old.get(key) != new.get(key)
    )


def workspace_nearby(root: Path) -> Path | None:
    """The workspace beside ``root`` whose name is most like it; None where there is none."""
    beside = {path.parent.name: path.parent for path in root.absolute().parent.glob("*/run.json")}
    near = nearest(root.name, beside)
    return None if near is None else root.parent / near


class Workspace:
    """A chain of stages in one folder.

    Args:
        root: The folder (``--run``); created by the first stage.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._manifest: dict[str, Any] = {"format_version": FORMAT_VERSION, "model": None, "stages": []}
        if (root / "run.json").is_file():
            self._manifest = read_json(root / "run.json")
        elif root.exists() and (not root.is_dir() or any(p.name not in _REMAINS for p in root.iterdir())):
            raise UsageError(
                f"{root} exists and is not a workspace (it has no run.json).",
                "Choose an empty or new folder with --run.",
            )

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the workspace alone; a folder in which nothing came to be is removed again.

        Raises:
            CompressError: Another process holds it.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.root / ".lock", timeout=0)
        try:
            lock.acquire()
        except Timeout as error:
            raise CompressError(
                f"Another compress command is working in {self.root}.", "Wait for it, or use another --run."
            ) from error
        try:
            if (self.root / "run.json").is_file():
                self._manifest = read_json(self.root / "run.json")
            yield
        finally:
            # While the lock is held: a command that waits for it must not lose its folder.
            if not self._manifest["stages"] and {p.name for p in self.root.iterdir()} <= {
                "run.json",
                *_REMAINS,
            }:
                shutil.rmtree(self.root)
            lock.release()

    @property
    def model(self) -> dict[str, Any] | None:
        """The chain's original model: ``name``, ``path`` and ``fingerprint``."""
        found: dict[str, Any] | None = self._manifest["model"]
        return found

    def set_model(self, model: Mapping[str, Any]) -> None:
        """Name the chain's original model; written to disk when the first stage begins.

        Raises:
            UsageError: The chain already starts from another model.
        """
        known = self.model
        if known is not None and known["fingerprint"] != model["fingerprint"]:
            raise UsageError(
                f"The chain in {self.root} starts from {known['name']}, not from {model['name']}.",
                "Start another chain with --run DIR.",
            )
        if known is None:
            self._manifest["model"] = dict(model)

    @property
    def stages(self) -> list[Stage]:
        """The finished stages, in order."""
        found = []
        for name in self._manifest["stages"]:
            path = self.root / name
            if not (path / "stage.json").is_file():
                raise CompressError(
                    f"The stage {name} of {self.root} is listed but its folder is gone.",
                    "Restore it, or use another --run.",
                )
            found.append(Stage(path=path, record=read_json(path / "stage.json")))
        return found

    def find(self, verb: str) -> Stage | None:
        """The finished stage of ``verb``, if there is one."""
        return next((stage for stage in self.stages if stage.verb == verb), None)

    def model_before(self, verb: str) -> Stage | None:
        """The last stage with a model that came before ``verb``; None means the original model."""
        last = None
        for stage in self.stages:
            if stage.verb == verb:
                break
            if stage.verb in MODEL_VERBS:
                last = stage
        return last

    def partial(self, verb: str) -> Path | None:
        """The unfinished folder of ``verb``, if a run of it was interrupted."""
        return next(iter(sorted(self.root.glob(f"[0-9][0-9]-{verb}.partial"))), None)

    def open_partial(
        self, verb: str, config: Mapping[str, Any], inputs: Mapping[str, str], *, redo: bool
    ) -> Path:
        """The folder to work in: a fresh one, or the interrupted one of the very same request.

        In it, sub-folders hold finished steps and are kept; files directly in it are results that may be
        half-written and are removed. A finished stage of the same verb stays until the new one is complete.

        Raises:
            UsageError: An interrupted run of this verb had other settings and ``redo`` is not given.
        """
        wanted = stage_id(verb, config, inputs)
        path = self.partial(verb)
        if path is not None:
            marker = path / "partial.json"
            known = read_json(marker) if marker.is_file() else {}
            if known.get("id") == wanted:
                for file in path.iterdir():
                    if file.is_file() and file != marker:
                        file.unlink()
                return path
            if known and not redo:
                raise UsageError(
                    f"An unfinished {verb} with other settings lies in {path.name} "
                    f"({differences(known['config'], config) or 'its input changed'}).",
                    "Repeat that command to finish it, give --redo to drop it, or use another --run.",
                )
            shutil.rmtree(path)
        replaced = None if verb in MEASUREMENTS else self.find(verb)
        number = self._next_number() if replaced is None else int(replaced.path.name[:2])
        self._save()
        path = self.root / f"{number:02d}-{verb}.partial"
        path.mkdir()
        write_json(
            path / "partial.json",
            {"format_version": FORMAT_VERSION, "id": wanted, "config": dict(config), "inputs": dict(inputs)},
        )
        return path

    def abandon(self, partial: Path) -> None:
        """Remove an unfinished folder that has no finished step to go on from."""
        if not any(path.is_file() for path in partial.glob("*/**/*")):
            shutil.rmtree(partial)

    def complete(self, partial: Path, record: Mapping[str, Any]) -> Stage:
        """Turn a finished partial folder into the chain's last stage: record, with its own hash, rename, list."""
        record = {**record, "record_sha256": record_digest(record)}
        final = self.root / f"{self._next_number():02d}-{record['verb']}"
        if final.exists():  # left unlisted by a run that was killed between the rename and the listing
            shutil.rmtree(final)
        write_json(partial / "stage.json", record)
        (partial / "partial.json").unlink()
        _settle(partial)
        os.replace(partial, final)
        if record["verb"] in MEASUREMENTS:
            self._drop([stage for stage in self.stages if stage.verb == record["verb"]])
        self._manifest["stages"].append(final.name)
        self._save()
        return Stage(path=final, record=record)

    def drop_from(self, verb: str) -> list[str]:
        """Remove the stage of ``verb`` and all that came after it, unfinished work too; returns their names."""
        stages = self.stages
        start = next((i for i, stage in enumerate(stages) if stage.verb == verb), len(stages))
        doomed = stages[start:]
        self._drop(doomed)
        if doomed:
            for path in self.root.glob("[0-9][0-9]-*.partial"):
                if path.name[:2] > doomed[0].path.name[:2]:
                    shutil.rmtree(path)
        return [stage.path.name for stage in doomed]

    def _drop(self, doomed: list[Stage]) -> None:
        names = {stage.path.name for stage in doomed}
        self._manifest["stages"] = [name for name in self._manifest["stages"] if name not in names]
        self._save()
        for stage in doomed:
            shutil.rmtree(stage.path)

    def _next_number(self) -> int:
        return max((int(name[:2]) for name in self._manifest["stages"]), default=0) + 1

    def _save(self) -> None:
        self.root.mkdir(parents=True, exist_ok=True)
        write_json(self.root / "run.json", self._manifest)
