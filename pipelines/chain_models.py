"""The models of a chain by name: the original, what every stage made, and adapters on what they belong to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from compress.adapters.attach import load_adapter
from compress.errors import UsageError, choose
from compress.model.load import load_model
from compress.pipelines.model_input import open_model, original
from compress.pipelines.small_files import require_base
from compress.pipelines.stage import Context
from compress.pipelines.workspace import Stage, Workspace

TITLES = {
    "original": "original",
    "pruned": "pruned",
    "aligned": "aligned",
    "quantized": "quantized",
    "trained": "small + adapter",
    "recovered": "full + recovered",
}
"""Name -> heading, in the order of a chain."""

MADE = {
    "prune": "pruned",
    "align": "aligned",
    "quantize": "quantized",
    "train": "trained",
    "recover": "recovered",
}
"""Verb -> name of the model that it makes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChainModel:
    """A model to open: its folder, and the adapter that goes on top of it, if any."""

    name: str
    model: Path
    adapter: Path | None

    @property
    def title(self) -> str:
        """Its heading."""
        return TITLES[self.name]

    def open(self, device: str, dtype: torch.dtype) -> Any:
        """The model in memory, its adapter on top, in evaluation mode."""
        network: Any = load_model(self.model, dtype=dtype, device=device)
        return network if self.adapter is None else load_adapter(network, self.adapter).eval()


def names_in(workspace: Workspace) -> list[str]:
    """The models a chain has, in the order they were made; the original first."""
    return ["original", *(MADE[stage.verb] for stage in workspace.stages if stage.verb in MADE)]


def chosen(workspace: Workspace, models: str | None) -> list[str]:
    """The names in ``models``, separated by commas; by default the original and what the chain came to.

    Raises:
        UsageError: An unknown name, or a model that the chain does not have.
    """
    there = names_in(workspace)
    if models is None:
        return list(dict.fromkeys((there[0], there[-1])))
    if models == "all":
        return there
    names = [name.strip() for name in models.split(",")]
    for name in names:
        if name not in TITLES:
            raise UsageError(f"There is no model {name!r} in a chain.", choose(name, [*TITLES, "all"]))
        if name not in there:
            raise UsageError(
                f"The chain in {workspace.root} has no {name} model.",
                f"Choose among {', '.join(there)}, or make it first: compress {verb_of(name)}.",
            )
    return list(dict.fromkeys(names))


def located(context: Context, names: Sequence[str]) -> list[ChainModel]:
    """Where the named models lie; the original is looked for only when one of them needs it.

    Raises:
        CompressError: The original model is needed and is not there, or has changed; so of the one recovered onto.
    """
    return [_located(context, name) for name in names]


def _located(context: Context, name: str) -> ChainModel:
    if name == "original":
        return ChainModel(name=name, model=original(context).path, adapter=None)
    stage = _stage(context.workspace, name)
    if name == "trained":
        small = context.workspace.model_before("train")
        model = original(context).path if small is None else small.path
        return ChainModel(name=name, model=model, adapter=stage.path)
    if name == "recovered":
        onto = stage.record["config"].get("onto")
        full = original(context) if onto is None else open_model(context, str(onto))
        require_base(stage.path, full.path, full.checkpoint)
        return ChainModel(name=name, model=full.path, adapter=stage.path)
    return ChainModel(name=name, model=stage.path, adapter=None)


def _stage(workspace: Workspace, name: str) -> Stage:
    return next(stage for stage in workspace.stages if MADE.get(stage.verb) == name)


def verb_of(name: str) -> str:
    """The verb that makes a model of this name."""
    return next(verb for verb, made in MADE.items() if made == name)
