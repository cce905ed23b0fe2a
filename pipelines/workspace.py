"""The workspace: a chain of stages on disk, complete or absent, never half-written.

``run.json`` names the original model and lists the finished stages in order. A stage is a folder
``NN-verb`` that appears by one rename when it is complete; until then its work lies in
``NN-verb.partial`` and the same command goes on from there.

A stage is complete once its ``stage.json`` is on disk. What then remains (drop the stages it replaces, drop
scratch, rename, list it) is written into ``run.json`` first, as ``pending``, and carried out by whoever holds the
workspace next if this process is killed before it is through.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from compress.durable import replacing, settle
from compress.errors import CompressError, UsageError, nearest
from compress.pipelines.identity import changed_inputs, code_version, differences, record_digest, stage_id

FORMAT_VERSION = 1
MODEL_VERBS = ("prune", "align", "quantize")
"""Verbs whose artifact is a model that the next verb takes as its input."""
MEASUREMENTS = ("eval",)
"""Verbs that only measure: a newer one replaces the older without being asked to."""

_REMAINS = (".lock", "run.json.tmp")
"""What a run leaves that was killed before its workspace came to be."""


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as JSON, durably: a reader sees the old file or the new one, never half of one."""
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=2, sort_keys=True, ensure_ascii=False, default=str)
        file.write("\n")


def _settle(folder: Path) -> None:
    """Have the disk hold every file below a folder, before anything says that it is complete."""
    for path in [*folder.rglob("*"), folder]:
        settle(path)


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
        self._carried_out: str | None = None
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
            self._carried_out = self._carry_out()
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
        self,
        verb: str,
        config: Mapping[str, Any],
        inputs: Mapping[str, str],
        *,
        redo: bool,
        threads: int | None = None,
    ) -> Path:
        """The folder to work in: a fresh one, or the interrupted one of the very same request.

        In it, sub-folders hold finished steps and are kept; files directly in it are results that may be
        half-written and are removed, unless :meth:`finished` says that all is done. A finished stage of the same
        verb stays until the new one is complete. ``threads`` are noted for :meth:`threads_of`.

        Raises:
            UsageError: An interrupted run of this verb had other settings, or was another version's, and ``redo`` is
                not given.
        """
        wanted = stage_id(verb, config, inputs)
        path = self.partial(verb)
        if path is not None:
            marker = path / "partial.json"
            known = read_json(marker) if marker.is_file() else {}
            begun, code = known.get("code"), code_version(verb)
            mixed = begun not in (None, code) and self.finished(path) is None
            if known.get("id") == wanted and mixed and not redo:
                raise UsageError(
                    f"An unfinished {verb} of other code ({begun}; this is {code}) lies in {path.name}.",
                    "Finish it with that version, give --redo to begin anew, or use another --run.",
                )
            if known.get("id") == wanted and not mixed:
                if self.finished(path) is None:
                    for file in path.iterdir():
                        if file.is_file() and file != marker:
                            file.unlink()
                return path
            if known and not redo:
                raise UsageError(
                    f"An unfinished {verb} with other settings lies in {path.name} "
                    f"({differences(known['config'], config) or changed_inputs(known['inputs'], inputs)}).",
                    "Repeat that command to finish it, give --redo to drop it, or use another --run.",
                )
            shutil.rmtree(path)
        replaced = None if verb in MEASUREMENTS else self.find(verb)
        number = (
            self._next_number(self._manifest["stages"]) if replaced is None else int(replaced.path.name[:2])
        )
        self._save()
        path = self.root / f"{number:02d}-{verb}.partial"
        path.mkdir()
        write_json(
            path / "partial.json",
            {
                "format_version": FORMAT_VERSION,
                "id": wanted,
                "config": dict(config),
                "inputs": dict(inputs),
                "threads": threads,
                "code": code_version(verb),
            },
        )
        return path

    def threads_of(self, partial: Path) -> int | None:
        """The number of threads that an unfinished stage was begun with; None where it was not noted."""
        threads = read_json(partial / "partial.json").get("threads")
        return None if threads is None else int(threads)

    def abandon(self, partial: Path) -> None:
        """Remove an unfinished folder that has no finished step to go on from."""
        if not any(path.is_file() for path in partial.glob("*/**/*")):
            shutil.rmtree(partial)

    def finished(self, partial: Path) -> dict[str, Any] | None:
        """The record in a partial folder that was killed after :meth:`record` and before it was renamed."""
        path = partial / "stage.json"
        record = read_json(path) if path.is_file() else {}
        return record if record.get("record_sha256") == record_digest(record) else None

    def record(self, partial: Path, record: Mapping[str, Any]) -> dict[str, Any]:
        """Write ``stage.json``, with its own hash, into a folder whose work is done; nothing is lost from here on."""
        _settle(partial)
        whole = {**record, "record_sha256": record_digest(record)}
        write_json(partial / "stage.json", whole)
        return whole

    def complete(
        self,
        partial: Path,
        record: Mapping[str, Any],
        *,
        scratch: Sequence[str] = (),
        replaces: str | None = None,
    ) -> Stage:
        """Turn a finished partial folder into the chain's last stage.

        Args:
            partial: Its work is done.
            record: What goes into ``stage.json``.
            scratch: Patterns of sub-folders that go.
            replaces: A verb whose stage goes, with all that came after it, unfinished work too.
        """
        if self.finished(partial) is None:
            record = self.record(partial, record)
        names: list[str] = self._manifest["stages"]
        measures = record["verb"] in MEASUREMENTS
        dropped = self.names_from(replaces) if replaces is not None else []
        if measures:
            dropped = [stage.path.name for stage in self.stages if stage.verb == record["verb"]]
        kept = [name for name in names if name not in dropped]
        final = f"{self._next_number(names if measures else kept):02d}-{record['verb']}"
        doomed = [*dropped, *(self._unfinished_after(dropped[0]) if dropped and not measures else [])]
        self._manifest["stages"] = kept
        self._manifest["pending"] = {
            "from": partial.name,
            "to": final,
            "drop": [name for name in doomed if name != partial.name],
            "scratch": sorted({path.name for pattern in scratch for path in partial.glob(pattern)}),
        }
        self._save()
        self._carry_out()
        return Stage(path=self.root / final, record=record)

    def _carry_out(self) -> str | None:
        """Do what ``pending`` says, or the rest of it; returns the name of the stage that this completes."""
        pending: dict[str, Any] | None = self._manifest.get("pending")
        if pending is None:
            return None
        partial, final = self.root / pending["from"], self.root / pending["to"]
        if partial.is_dir():  # else it has its name, which a stage that was dropped may have had before
            for name in pending["drop"]:
                if (self.root / name).exists():
                    shutil.rmtree(self.root / name)
            for name in pending["scratch"]:
                if (partial / name).exists():
                    shutil.rmtree(partial / name)
            (partial / "partial.json").unlink(missing_ok=True)
            if final.exists():  # of a version that listed a stage only after it had renamed it
                shutil.rmtree(final)
            os.replace(partial, final)
            settle(self.root)
        del self._manifest["pending"]
        if (final / "stage.json").is_file():
            self._manifest["stages"].append(final.name)
        self._save()
        return str(pending["to"])

    def was_carried_out(self, stage: Stage) -> bool:
        """Whether a killed command had made this stage, and this one only had to rename and list it."""
        return stage.path.name == self._carried_out

    def drop_from(self, verb: str) -> list[str]:
        """Remove the stage of ``verb`` and all that came after it, unfinished work too; returns their names."""
        dropped = self.names_from(verb)
        unfinished = self._unfinished_after(dropped[0]) if dropped else []
        self._manifest["stages"] = [name for name in self._manifest["stages"] if name not in dropped]
        self._save()
        for name in (*dropped, *unfinished):
            shutil.rmtree(self.root / name)
        return dropped

    def names_from(self, verb: str) -> list[str]:
        """Names of the stage of ``verb`` and of all that came after it."""
        stages = self.stages
        start = next((i for i, stage in enumerate(stages) if stage.verb == verb), len(stages))
        return [stage.path.name for stage in stages[start:]]

    def _unfinished_after(self, name: str) -> list[str]:
        return sorted(
            path.name for path in self.root.glob("[0-9][0-9]-*.partial") if path.name[:2] > name[:2]
        )

    @staticmethod
    def _next_number(names: Sequence[str]) -> int:
        return max((int(name[:2]) for name in names), default=0) + 1

    def _save(self) -> None:
        self.root.mkdir(parents=True, exist_ok=True)
        write_json(self.root / "run.json", self._manifest)
