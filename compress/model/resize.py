"""The config of a pruned model, proved to load in stock transformers."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from compress.errors import CompressError
from compress.model.config import build_config, meta_shapes, shallow_config
from compress.model.family import Fallback, family_of
from compress.model.layout import Architecture, expected_shapes


def resized_config(
    config: Mapping[str, Any],
    arch: Architecture,
    *,
    heads: int,
    kv_heads: int,
    channels: int,
    prove: bool = True,
) -> dict[str, Any]:
    """The config.json of the same model with fewer heads and MLP channels, proved to load in transformers.

    The proof builds the config class and a one-layer model without weights, and compares every shape.
    A Llama without biases whose head count LlamaConfig refuses is written as Mistral (METHODS §1.3).

    Args:
        config: The original's config.json content.
        arch: The original's architecture.
        heads: Query heads kept, a multiple of ``kv_heads``.
        kv_heads: Key/value heads kept.
        channels: MLP channels kept.
        prove: Build the model too. Without, the config class alone is asked: enough to compare many shapes of a
            declared family, whose models are known to follow their config.

    Raises:
        CompressError: The sizes are impossible, or no config class takes them (the remedy lists what works).
    """
    _check_sizes(arch, heads, kv_heads, channels)
    small = replace(arch, heads=heads, kv_heads=kv_heads, channels=channels, layers=1)
    changed = copy.deepcopy(dict(config))
    changed.pop("_name_or_path", None)
    if arch.prunable_channels:
        changed[arch.channels_key] = channels
    if arch.prunable_heads:
        changed |= {arch.heads_key: heads, arch.kv_heads_key: kv_heads, "head_dim": arch.head_dim}
    try:
        built = build_config(changed)
    except CompressError as error:
        fallback = _fallback_config(config, arch, changed)
        if fallback is None:
            works = ", ".join(map(str, accepted_kv_heads(config, arch, queries=heads // kv_heads)))
            raise CompressError(
                f"transformers does not load a {arch.family} model with {heads} heads: {error.cause}",
                f"Keep one of these numbers of key/value heads instead: {works}."
                if works
                else "Keep another number of query heads in every key/value group.",
            ) from error
        changed = fallback
        built = build_config(changed)
    if not prove:
        return changed
    shapes = meta_shapes(shallow_config(build_config(config), 1)) | expected_shapes(small)
    found = meta_shapes(shallow_config(built, 1))
    for name in sorted(shapes.keys() | found.keys()):
        if shapes.get(name) != found.get(name):
            raise CompressError(
                f"transformers would give {name!r} the shape {found.get(name)} where the pruned model has "
                f"{shapes.get(name)}.",
                "Prune only heads or only MLP channels, or choose another shape.",
            )
    return changed


def accepted_kv_heads(
    config: Mapping[str, Any], arch: Architecture, *, queries: int | None = None
) -> tuple[int, ...]:
    """The numbers of key/value heads that a config class takes, ascending; each with ``queries`` query heads or all."""
    if not arch.prunable_heads:
        return (arch.kv_heads,)
    accepted = []
    for count in range(1, arch.kv_heads + 1):
        changed = dict(config) | {
            arch.heads_key: count * (queries or arch.queries_per_group),
            arch.kv_heads_key: count,
            "head_dim": arch.head_dim,
        }
        if _builds(changed) or _fallback_config(config, arch, changed) is not None:
            accepted.append(count)
    return tuple(accepted)


def _builds(config: Mapping[str, Any]) -> bool:
    try:
        build_config(config)
    except CompressError:
        return False
    return True


def _fallback_config(
    config: Mapping[str, Any], arch: Architecture, changed: Mapping[str, Any]
) -> dict[str, Any] | None:
    family = family_of(arch.family)
    fallback: Fallback | None = family.fallback if family is not None else None
    if fallback is None:
        return None
    full = build_config(config).to_dict()  # every default written out: the two classes' defaults differ
    if any(full.get(key) for key in fallback.only_without):
        return None
    for key in (*fallback.drop, "_name_or_path"):
        full.pop(key, None)
    sizes = {
        key: changed[key]
        for key in (arch.heads_key, arch.kv_heads_key, arch.channels_key, "head_dim")
        if key in changed
    }
    full |= {
        **fallback.changes,
        **sizes,
        "model_type": fallback.model_type,
        "architectures": [fallback.architecture],
    }
    try:
        written: dict[str, Any] = build_config(full).to_diff_dict()
    except CompressError:
        return None
    return written


def _check_sizes(arch: Architecture, heads: int, kv_heads: int, channels: int) -> None:
    if not arch.prunable_heads and (heads, kv_heads) != (arch.heads, arch.kv_heads):
        raise CompressError(
            f"Attention heads cannot be pruned: {arch.heads_reason}.", "Prune MLP channels only."
        )
    if not (1 <= kv_heads <= arch.kv_heads and 1 <= heads <= arch.heads and 1 <= channels <= arch.channels):
        raise CompressError(
            f"{heads} heads, {kv_heads} key/value heads and {channels} channels do not fit into "
            f"{arch.heads}, {arch.kv_heads} and {arch.channels}.",
            "Keep at least one of each and no more than the model has.",
        )
    if heads % kv_heads:
        raise CompressError(
            f"{heads} query heads do not divide among {kv_heads} key/value heads.",
            "Keep the same number of query heads in every key/value group.",
        )
    if not arch.prunable_channels and channels != arch.channels:
        raise CompressError(f"MLP channels cannot be pruned: {arch.channels_reason}.", "Prune heads only.")
