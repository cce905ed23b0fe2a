"""A stage's files against its record: they are there, unchanged, and every tensor in them is a finite number."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from compress.errors import CompressError
from compress.model.tensor_file import TensorEntry, read_header
from compress.pipelines.identity import record_digest, stage_id
from compress.pipelines.integrity import files_below, hash_file
from compress.pipelines.verify_target import Chain, Finding, Target
from compress.pipelines.workspace import Stage
from compress.progress import Progress

HEADERS = "headers"
"""The check that fails when a weight file cannot be read at all."""


def check_record(target: Target, stage: Stage) -> Iterator[Finding]:
    """``stage.json``: its hash, that its id belongs to its settings, and that it lies in its own folder."""
    record, failed = stage.record, False
    remedy = "Restore stage.json from a copy, or make the stage again with --redo."
    if record.get("record_sha256") not in (None, record_digest(record)):
        failed = True
        yield target.differs("record", "stage.json was changed after the stage was complete", remedy)
    if stage.id != stage_id(stage.verb, record["config"], record["inputs"]):
        failed = True
        yield target.differs(
            "record", "the id is not that of the verb, settings and inputs beside it", remedy
        )
    if target.chain is not None and target.path.name.partition("-")[2] != stage.verb:
        failed = True
        yield target.differs(
            "record",
            f"the folder holds a stage of {stage.verb}",
            "Give the folders of the stages their own names back.",
        )
    if failed:
        return
    if record.get("record_sha256") is None:
        yield target.not_recorded("record", "its id is right; stage.json has no hash of itself")
    else:
        yield target.ok("record", "stage.json is unchanged, its id is right")


def check_files(target: Target, stage: Stage, progress: Progress) -> Iterator[Finding]:
    """Every recorded file: there, of the recorded size and hash."""
    recorded = stage.record.get("files")
    if recorded is None:
        yield target.not_recorded("files", "the stage was made before hashes were recorded")
        return
    found, failed = files_below(target.path), False
    for done, (name, entry) in enumerate(sorted(recorded.items()), start=1):
        fault = ""
        if name not in found:
            fault = f"{name} is missing"
        elif found[name].stat().st_size != entry["bytes"]:
            fault = f"{name} has {found[name].stat().st_size} bytes, {entry['bytes']} recorded"
        elif (actual := hash_file(found[name])) != entry["sha256"]:
            fault = f"{name} has other content than was recorded{_other_home(target.chain, actual)}"
        progress(done, len(recorded), name)
        if fault:
            failed = True
            yield target.differs("files", fault)
    if not failed:
        extra = sorted(set(found) - set(recorded))
        more = f"; not part of the stage: {', '.join(extra)}" if extra else ""
        yield target.ok("files", f"{len(recorded)} files as recorded{more}")


def _other_home(chain: Chain | None, sha256: str) -> str:
    """Where in the chain a file of this hash belongs."""
    for name, stage in (chain.stages if chain is not None else {}).items():
        for file, entry in (stage.record.get("files") or {}).items():
            if entry["sha256"] == sha256:
                return f": it is {file} of {name}"
    return ""


def check_tensors(target: Target, progress: Progress) -> Iterator[Finding]:
    """Every safetensors file below the folder: a sound header, no NaN and no infinity; one tensor at a time.

    A file whose header is broken is a finding of the check ``headers``; the others are still read.
    """
    entries: list[tuple[str, str, TensorEntry]] = []
    failed = False
    for file in sorted(target.path.rglob("*.safetensors")):
        place = file.relative_to(target.path).as_posix()
        try:
            entries += [(place, name, entry) for name, entry in read_header(file)[0].items()]
        except CompressError as error:
            failed = True
            yield target.differs(HEADERS, error.cause)
    for done, (place, name, entry) in enumerate(entries, start=1):
        if entry.dtype.is_floating_point:
            tensor = entry.read()
            wide = tensor.float() if tensor.itemsize == 1 else tensor  # isfinite knows no 8-bit floats
            wrong = int((~torch.isfinite(wide)).sum())
            if wrong:
                failed = True
                yield target.differs("tensors", f"{name} in {place} has {wrong} values that are not finite")
        progress(done, len(entries), name)
    if not failed and entries:
        yield target.ok("tensors", f"{len(entries)} tensors, all finite")
