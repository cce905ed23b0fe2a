"""Which model a verb works on: the chain's last artifact, or the model it is started with."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from compress.errors import CompressError, UsageError, choose
from compress.model.architecture import Architecture
from compress.model.checkpoint import Checkpoint, checkpoint_architecture
from compress.model.load import EMBEDDED, preferred_dtype, resolve, resolve_headers
from compress.model.planned import PlannedCheckpoint, headers_of
from compress.pipelines.integrity import require_unchanged
from compress.pipelines.settings import Common
from compress.pipelines.stage import Context
from compress.pipelines.workspace import Stage

HUB_NAME = {EMBEDDED: "HuggingFaceTB/SmolLM2-135M-Instruct"}
"""The public name of an embedded model, for adapters that must name their base."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInput:
    """A model on disk as the input of a stage.

    Attributes:
        name: What the user calls it.
        path: Its folder.
        id: Its identity; empty where a dry run has not fetched its weights.
        checkpoint: Its tensors, or in such a dry run what its config says of them.
        architecture: What it is made of.
    """

    name: str
    path: Path
    id: str
    checkpoint: Checkpoint
    architecture: Architecture


def original(context: Context) -> ModelInput:
    """The model the chain starts from; decided by the first verb of the chain. A dry run fetches no weights for it.

    Raises:
        UsageError: ``--model`` names another model than the chain's own.
        CompressError: The chain's model is gone or has changed since.
    """
    common, workspace = context.common, context.workspace
    known = workspace.model
    if known is not None and common.model in (None, known["name"]):
        path = Path(known["path"])
        if not path.is_dir():
            path = _resolve(context, known["name"])
        found = _opened(context, known["name"], path)
        if found.id and found.id != known["fingerprint"]:
            raise CompressError(
                f"The model {known['name']} has changed since this chain began.",
                "Start another chain with --run DIR.",
            )
        return found
    name = common.model or EMBEDDED
    found = _opened(context, name, _resolve(context, name))
    if not found.id and known is None:
        return found
    workspace.set_model({"name": name, "path": str(found.path.resolve()), "fingerprint": found.id})
    return found


def current(context: Context, verb: str, start: ModelInput | None = None) -> ModelInput:
    """The model that ``verb`` works on: the last model stage before it, else the original.

    Args:
        context: Has the chain.
        verb: The stage.
        start: The original, where it is known.

    Raises:
        CompressError: Its files are not those that the stage before recorded.
    """
    start = original(context) if start is None else start
    stage = context.workspace.model_before(verb)
    if stage is None:
        return start
    checkpoint = Checkpoint(stage.path)
    check_stage(context, stage)
    return ModelInput(
        name=stage.path.name,
        path=stage.path,
        id=stage.id,
        checkpoint=checkpoint,
        architecture=checkpoint_architecture(checkpoint),
    )


def check_stage(context: Context, stage: Stage, *, only: Sequence[str] = ()) -> None:
    """Refuse a finished stage that another is about to build on when its files are not what it recorded.

    Raises:
        CompressError: See `compress.pipelines.integrity.require_unchanged`.
    """
    with context.reporter.bar(f"check {stage.path.name}") as progress:
        require_unchanged(stage.path, stage.record, only=only, progress=progress)


def open_model(context: Context, name: str) -> ModelInput:
    """Any model by name, folder or GGUF file."""
    return _opened(context, name, _resolve(context, name))


def base_name(context: Context) -> str:
    """The public name of the chain's original model."""
    known = context.workspace.model
    name = str(known["name"]) if known is not None else context.common.model or EMBEDDED
    return HUB_NAME.get(name, name)


def _resolve(context: Context, name: str) -> Path:
    if context.common.dry_run:
        return resolve_headers(name)
    with context.reporter.bar(f"model {name}") as progress:
        return resolve(name, progress=progress)


def _opened(context: Context, name: str, path: Path) -> ModelInput:
    checkpoint = headers_of(str(path))[0] if context.common.dry_run else Checkpoint(path)
    architecture = checkpoint_architecture(checkpoint)  # reads headers only, so it comes first
    if isinstance(checkpoint, PlannedCheckpoint):
        return ModelInput(name=name, path=path, id="", checkpoint=checkpoint, architecture=architecture)
    checkpoint.require_finite()
    return ModelInput(
        name=name, path=path, id=checkpoint.fingerprint(), checkpoint=checkpoint, architecture=architecture
    )


def device_and_dtype(common: Common) -> tuple[str, Any]:
    """The torch device and compute dtype to use; ``auto`` picks CUDA where there is one.

    Raises:
        UsageError: The device is not there or the dtype has no such name.
    """
    device = common.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:[0-9]+)?", device):
        raise UsageError(f"There is no device {common.device!r}.", "Choose auto, cpu, cuda or cuda:N.")
    if device != "cpu" and int(device.partition(":")[2] or 0) >= torch.cuda.device_count():
        raise UsageError(f"There is no CUDA device {common.device!r} here.", "Use --device cpu.")
    names = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if common.dtype == "auto":
        return device, preferred_dtype(device)
    if common.dtype not in names:
        raise UsageError(f"There is no dtype {common.dtype!r}.", choose(common.dtype, ["auto", *names]))
    return device, names[common.dtype]
