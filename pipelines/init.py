"""``compress init``: a recipe for one model and this machine, ready to run and to be changed."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from compress.data.sources import default_source
from compress.errors import UsageError
from compress.machine import Machine, this_machine
from compress.model.architecture import Architecture, architecture_of
from compress.model.config import build_config, meta_shapes, quantization_method
from compress.model.load import EMBEDDED, resolve_config
from compress.model.uneven import is_uneven, plain_config
from compress.pipelines.model_input import device_and_dtype
from compress.pipelines.recipe import SHARED_KEYS
from compress.pipelines.recipe_text import Draft, Meanings, recipe_text
from compress.pipelines.reporter import Reporter, human_bytes, human_count
from compress.pipelines.settings import VERBS, Common, resolve
from compress.pipelines.tool_settings import InitSettings

STDOUT = "-"
CHAIN = ("prune", "quantize", "train", "recover", "eval", "report")
HEADLINE: Mapping[str, dict[str, Any]] = {"prune": {"ratio": 0.5}, "quantize": {"budget": "2.75bit"}}
"""What everybody chooses: it stands in the recipe uncommented."""


def init(reporter: Reporter, common: Common, settings: InitSettings, meanings: Meanings) -> dict[str, Any]:
    """Write the recipe to a file, or to standard output.

    Args:
        reporter: Says where it went.
        common: Options that are given go into the recipe; ``effort`` is filled in.
        settings: The model, and where to write.
        meanings: What ``--help`` says of every option.

    Returns:
        ``path`` (None for standard output), ``effort``, ``fits`` and the text as ``recipe``.

    Raises:
        UsageError: The file exists and ``--force`` is not given, its folder does not, or the model is quantized.
        CompressError: There is no such model, or it is no dense decoder that is understood.
    """
    path = None if settings.out == STDOUT else Path(settings.out)
    if path is not None:
        refuse_path(path, force=settings.force)
    config = resolve_config(settings.model)
    if quantization_method(config) is not None:
        raise UsageError(
            f"The model {settings.model} is quantized already.",
            "Name the model it was made of; compress train goes on with this one.",
        )
    machine = this_machine()
    device, dtype = device_and_dtype(common)
    weights = parameters_of(config) * dtype.itemsize
    room = machine.memory if device == "cpu" else gpu_memory(machine, device)
    draft = Draft(
        head=head(settings.model or EMBEDDED, config, machine, common, device, dtype),
        shared={"model": settings.model or EMBEDDED, **given(common)},
        defaults={"data": default_source()},
        steps=[
            (verb, HEADLINE.get(verb, {}) | short_windows(verb, config, str(common.effort)))
            for verb in CHAIN
            if verb != "prune" or not is_uneven(config)
        ],
    )
    text = recipe_text(draft, meanings)
    if path is not None:
        write_whole(path, text)
        reporter.say(f"init: {path}; try it with: compress run {path} --dry-run")
    elif not reporter.quiet:
        sys.stdout.write(text)
    if weights > room:
        reporter.say(f"init: {too_large(weights, room, device)}")
    return {
        "path": None if path is None else str(path),
        "effort": common.effort,
        "fits": weights <= room,
        "recipe": text,
    }


def refuse_path(path: Path, *, force: bool) -> None:
    """Refuse a file that is there already, or that cannot be made.

    Raises:
        UsageError: As said.
    """
    if path.is_dir() or not path.parent.is_dir():
        raise UsageError(
            f"The recipe cannot be written to {path}.", "Give --out a file in a folder that exists."
        )
    if path.exists() and not force:
        raise UsageError(f"{path} exists.", "Give --force to replace it, or another file with --out.")


def write_whole(path: Path, text: str) -> None:
    """Write a file that is there whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def given(common: Common) -> dict[str, Any]:
    """The shared options that are not at their defaults, and the effort."""
    plain = Common()
    return {
        name: getattr(common, name)
        for name in SHARED_KEYS
        if name != "model" and getattr(common, name) != getattr(plain, name)
    }


def short_windows(verb: str, config: Mapping[str, Any], effort: str) -> dict[str, Any]:
    """``sequence``, where the model reads fewer tokens at once than the default has."""
    if verb not in VERBS:
        return {}
    positions = getattr(build_config(plain_config(config)), "max_position_embeddings", None)
    wanted = getattr(resolve(VERBS[verb], {}, effort), "sequence", 0)
    return {"sequence": int(positions)} if positions and wanted > positions else {}


def head(
    name: str, config: Mapping[str, Any], machine: Machine, common: Common, device: str, dtype: torch.dtype
) -> list[str]:
    """What the recipe is for: the model, the machine, and why this effort."""
    parameters = parameters_of(config)
    weights = human_bytes(parameters * dtype.itemsize)
    room = machine.memory if device == "cpu" else gpu_memory(machine, device)
    where = machine.processor if device == "cpu" else "a GPU"
    lines = [
        f"A recipe for {name}, written by `compress init`. Run it with: compress run FILE",
        f"The model: {describe(architecture_of(dict(config)))}; {human_count(parameters)} parameters, {weights} in "
        f"{str(dtype).removeprefix('torch.')}.",
        f"The machine: {where} ({device}), {human_bytes(room)} of memory. Effort {common.effort}.",
    ]
    if parameters * dtype.itemsize > room:
        lines.append(too_large(parameters * dtype.itemsize, room, device))
    return lines


def describe(arch: Architecture) -> str:
    """The sizes of a model in words."""
    groups = f"{arch.heads} heads in {arch.kv_heads} KV groups of {arch.head_dim} wide"
    return (
        f"{arch.family}, {arch.layers} layers of width {arch.hidden}, {groups}, {arch.channels} MLP channels"
    )


def parameters_of(config: Mapping[str, Any]) -> int:
    """Parameters that the config asks for; no weight is read."""
    return sum(math.prod(shape) for shape in meta_shapes(build_config(plain_config(config))).values())


def gpu_memory(machine: Machine, device: str) -> int:
    """Bytes of memory of a CUDA device."""
    return machine.cuda[int(device.partition(":")[2] or 0)].memory


def too_large(weights: int, room: int, device: str) -> str:
    """What to say of a model that this machine cannot hold whole."""
    return (
        f"The weights alone take {human_bytes(weights)} and {device} has {human_bytes(room)}. prune, quantize and "
        "recover read such a model layer by layer (--memory-limit says how much of the host they may take). What "
        "trains (train, align, the repair of prune) and eval hold their models whole. compress plan counts what each "
        "step needs and says what to change."
    )
