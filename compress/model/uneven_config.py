"""The config of a model pruned to different sizes per layer, proved to run in transformers' own classes."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from compress.errors import CompressError
from compress.model.config import build_config, meta_shapes, shallow_config
from compress.model.layout import Architecture, LayerShape, Shapes, expected_shapes
from compress.model.uneven import shape_fault, uneven_entries
from compress.model.uneven_model import uneven_class

_TOKENS = 3


def uneven_config(
    config: Mapping[str, Any], arch: Architecture, shapes: Sequence[LayerShape]
) -> dict[str, Any]:
    """The config.json of the same model with layers of ``shapes``.

    The proof builds the model without weights, compares every shape, and runs it.

    Args:
        config: The original's config.json content.
        arch: The original's architecture.
        shapes: What each layer keeps.

    Raises:
        CompressError: The sizes are impossible, or transformers' classes cannot be given them.
    """
    refuse_uneven(arch)
    full = LayerShape(kv_heads=arch.kv_heads, queries=arch.queries_per_group, channels=arch.channels)
    if len(shapes) != arch.layers:
        raise CompressError(
            f"There are {len(shapes)} shapes for {arch.layers} layers.", "Give one for each layer."
        )
    for index, shape in enumerate(shapes):
        if fault := shape_fault(shape, full):
            raise CompressError(f"Layer {index} {fault}.", "Keep no more than the model has.")
        heads = (shape.kv_heads, shape.queries) == (full.kv_heads, full.queries)
        if not arch.prunable_heads and not heads:
            raise CompressError(
                f"Attention heads cannot be pruned: {arch.heads_reason}.", "Prune MLP channels only."
            )
    changed = uneven_entries(copy.deepcopy(dict(config)), shapes)
    changed.pop("_name_or_path", None)
    if fault := _fault(config, changed, replace(arch, layer_shapes=tuple(shapes))):
        raise CompressError(
            f"The layers of a {arch.family} model cannot differ in size: {fault}.",
            "Prune every layer to the same shape.",
        )
    return changed


def can_be_uneven(config: Mapping[str, Any], arch: Architecture) -> str:
    """Why the layers of a model cannot differ in size, or "" when they can.

    It tries a copy of two layers without weights: one with a single query head and channel, one with neither attention
    (where heads can be pruned) nor MLP.

    Args:
        config: The content of config.json.
        arch: The architecture read from it.
    """
    if arch.layer_shapes is not None:
        return "they differ already"
    if not arch.branch(attention=False) or (arch.prunable_heads and not arch.branch(attention=True)):
        return "an attention or MLP is no module of its own in transformers' class"
    shallow = shallow_config(build_config(config), 2).to_dict()
    heads = (1, 1) if arch.prunable_heads else (arch.kv_heads, arch.queries_per_group)
    small = LayerShape(kv_heads=heads[0], queries=heads[1], channels=1)
    gone = replace(small, kv_heads=0 if arch.prunable_heads else arch.kv_heads, channels=0)
    shapes = (small, gone)[: min(2, arch.layers)]
    small_arch = replace(arch, layers=len(shapes), layer_shapes=shapes)
    return _fault(shallow, uneven_entries(shallow, shapes), small_arch)


def refuse_uneven(arch: Architecture) -> None:
    """Refuse a model whose layers differ in size.

    Raises:
        CompressError: They do.
    """
    if arch.layer_shapes is not None:
        raise CompressError(
            "The layers of this model differ in size already, and pruning starts from layers that are alike.",
            "Prune the original model again, by the ratio you want in all.",
        )


def _fault(plain: Mapping[str, Any], uneven: Mapping[str, Any], arch: Architecture) -> str:
    """Why transformers' classes cannot be given the layers of ``uneven``, whose architecture is ``arch``, or ""."""
    if arch.gone() and not arch.branch(attention=False):
        return "the MLP is no module of its own in transformers' class"
    gone = tuple(f"{name}." for name in arch.gone())
    before = {k: v for k, v in meta_shapes(build_config(plain)).items() if not k.startswith(gone)}
    found = _run_without_weights(uneven, arch)
    if isinstance(found, str):
        return found
    expected = before | expected_shapes(arch)
    wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    return f"{wrong[0]!r} would have the shape {found.get(wrong[0])}" if wrong else ""


def _run_without_weights(config: Mapping[str, Any], arch: Architecture) -> Shapes | str:
    """Name and shape of every parameter of an uneven model that runs, or why it does not."""
    built = build_config(config)
    vars(built).pop("quantization_config", None)
    with torch.random.fork_rng(devices=[]), torch.device("meta"), torch.no_grad():
        model: Any = uneven_class(config, arch)(built).eval()
        try:
            # a ready mask [1, 1, S, S]: transformers looks at values to make one, and here are none
            model(
                input_ids=torch.zeros(1, _TOKENS, dtype=torch.long),
                attention_mask=torch.zeros(1, 1, _TOKENS, _TOKENS),
                use_cache=False,
            )
        except (RuntimeError, ValueError, TypeError, AttributeError) as error:  # whatever the class relies on
            return f"transformers' class does not run with them ({str(error).splitlines()[0]})"
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
