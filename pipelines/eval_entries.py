"""The models of an evaluation: what a chain has made, or whatever the user names."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from compress.errors import CompressError, UsageError
from compress.model.checkpoint import Checkpoint
from compress.model.config import build_config, meta_shapes, quantization_method
from compress.model.load import EMBEDDED, resolve, resolve_headers
from compress.model.planned import PlannedCheckpoint, headers_of
from compress.pipelines.identity import digest
from compress.pipelines.integrity import describe_files
from compress.pipelines.model_input import HUB_NAME, ModelInput, check_stage, open_model
from compress.pipelines.reporter import Reporter
from compress.pipelines.small_files import require_base
from compress.pipelines.stage import Context
from compress.pipelines.verify_model import weights_of
from compress.pipelines.workspace import MEASUREMENTS, Workspace
from compress.quantize.checkpoint import QUANT_METHOD

ADAPTER_CONFIG = "adapter_config.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One row to measure: a model, with or without an adapter."""

    name: str
    model: Path
    adapter: Path | None
    parameters: int
    id: str


def chain_entries(context: Context, full: ModelInput) -> list[Entry]:
    """Original, each model stage, trained small model, and full + recovered, as far as they exist."""
    workspace = context.workspace
    parameters = weights_of(full.checkpoint)
    entries = [Entry(name="original", model=full.path, adapter=None, parameters=parameters, id=full.id)]
    names = {"prune": "pruned", "align": "aligned", "quantize": "quantized"}
    for stage in workspace.stages:
        if stage.verb not in MEASUREMENTS:
            check_stage(context, stage)
        metrics = stage.record["metrics"]
        last = entries[-1]
        if stage.verb in names:
            parameters = metrics["after"]["parameters"]
            entries.append(
                Entry(
                    name=names[stage.verb], model=stage.path, adapter=None, parameters=parameters, id=stage.id
                )
            )
        elif stage.verb == "train":
            small = workspace.model_before("train")
            entries.append(
                Entry(
                    name="small + adapter",
                    model=small.path if small is not None else full.path,
                    adapter=stage.path,
                    parameters=last.parameters,
                    id=stage.id,
                )
            )
        elif stage.verb == "recover":
            onto = stage.record["config"].get("onto")
            whole = full if onto is None else open_model(context, str(onto))
            require_base(stage.path, whole.path, whole.checkpoint)
            entries.append(
                Entry(
                    name="full + recovered",
                    model=whole.path,
                    adapter=stage.path,
                    parameters=weights_of(whole.checkpoint),
                    id=stage.id,
                )
            )
    return entries


def named_entries(reporter: Reporter, names: Sequence[str], *, dry: bool = False) -> list[Entry]:
    """The models a user named, in order; a folder is called by its last part where that tells it apart.

    Args:
        reporter: Shows conversions.
        names: What the user calls them.
        dry: Fetch no weights; see `named_entry`.

    Raises:
        UsageError: A model is named twice.
        CompressError: A model, or the base of an adapter, is not to be had.
    """
    twice = [name for name, times in Counter(names).items() if times > 1]
    if twice:
        raise UsageError(f"The model {twice[0]} is named {names.count(twice[0])} times.", "Name it once.")
    entries = [named_entry(reporter, name, dry=dry) for name in names]
    shared = {name for name, times in Counter(entry.name for entry in entries).items() if times > 1}
    return [
        replace(entry, name=given) if entry.name in shared else entry
        for given, entry in zip(names, entries, strict=True)
    ]


def named_entry(reporter: Reporter, name: str, *, dry: bool = False) -> Entry:
    """A model by hub id, folder (also of a PEFT adapter), GGUF file or embedded name.

    Args:
        reporter: Shows conversions.
        name: What the user calls it.
        dry: Fetch no more than config and index from the hub; where weights are not here, the entry has no identity.

    Raises:
        CompressError: It, or the base of the adapter, is not to be had.
    """
    path = _resolve(reporter, name, dry=dry)
    adapter = None
    if (path / ADAPTER_CONFIG).is_file() and not (path / "config.json").is_file():
        adapter, path = path, adapter_base(reporter, path, dry=dry)
    checkpoint = headers_of(str(path))[0] if dry else Checkpoint(path)
    if adapter is not None:
        require_base(adapter, path, checkpoint)
    files = {} if adapter is None else describe_files(adapter)
    given = Path(name).expanduser()
    here = not isinstance(checkpoint, PlannedCheckpoint)
    return Entry(
        name=given.resolve().name if given.exists() else name,
        model=path,
        adapter=adapter,
        parameters=parameters_of(checkpoint),
        id=digest({"model": checkpoint.fingerprint(), "adapter": files, "name": name}) if here else "",
    )


def parameters_of(checkpoint: Checkpoint) -> int:
    """Weights of a model; those of a checkpoint that another tool quantized are counted from its config."""
    if quantization_method(checkpoint.config) in (None, QUANT_METHOD):
        return weights_of(checkpoint)
    plain = {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}
    return sum(math.prod(shape) for shape in meta_shapes(build_config(plain)).values())


def adapter_base(reporter: Reporter, adapter: Path, *, dry: bool = False) -> Path:
    """The folder of the model that an adapter belongs to.

    An adapter that is a stage of a workspace belongs to that chain's small or full model. Any other names its base
    in ``adapter_config.json``: a folder (as it is, or beside the adapter), a hub id or an embedded model. ``dry``
    fetches no weights.

    Raises:
        CompressError: It names none, or one that is not to be had.
    """
    staged = _stage_base(reporter, adapter, dry=dry)
    if staged is not None:
        return staged
    try:
        config: Any = json.loads((adapter / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        base = config["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError) as error:
        raise CompressError(
            f"{adapter / ADAPTER_CONFIG} does not say which model the adapter is for.",
            "Write the model's folder or hub id there as base_model_name_or_path.",
        ) from error
    if not isinstance(base, str) or not base:
        raise CompressError(
            f"The adapter {adapter} names no base model.",
            f"Write the model's folder or hub id into {ADAPTER_CONFIG} as base_model_name_or_path.",
        )
    beside = adapter / base
    embedded = next((name for name, public in HUB_NAME.items() if public == base), None)
    try:
        if (beside / "config.json").is_file() and not (Path(base) / "config.json").is_file():
            return beside.resolve()
        return _resolve(reporter, EMBEDDED if embedded is not None else base, dry=dry)
    except CompressError as error:
        raise CompressError(
            f"The base {base!r} of the adapter {adapter} is not to be had: {error.cause}",
            f"Put it there, or write where it is into {ADAPTER_CONFIG} as base_model_name_or_path.",
        ) from error


def _stage_base(reporter: Reporter, adapter: Path, *, dry: bool) -> Path | None:
    """The model that an adapter of a workspace is on; None where the folder is no stage of ``train`` or ``recover``."""
    root = adapter.resolve().parent
    if not (adapter / "stage.json").is_file() or not (root / "run.json").is_file():
        return None
    workspace = Workspace(root)
    stage = next((s for s in workspace.stages if s.path.resolve() == adapter.resolve()), None)
    if stage is None or stage.verb not in ("train", "recover") or workspace.model is None:
        return None
    small = workspace.model_before("train") if stage.verb == "train" else None
    if small is not None:
        return small.path
    onto = stage.record["config"].get("onto") if stage.verb == "recover" else None
    return _resolve(reporter, str(onto), dry=dry) if onto is not None else Path(workspace.model["path"])


def _resolve(reporter: Reporter, name: str, *, dry: bool) -> Path:
    if dry:
        return resolve_headers(name)
    with reporter.bar(f"model {name}") as progress:
        return resolve(name, progress=progress)
