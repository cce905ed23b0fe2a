"""What a decoder is made of, read from its config alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from compress.errors import CompressError, shown
from compress.model.config import build_config, refuse_experts, refuse_quantized
from compress.model.family import Role, family_of
from compress.model.layout import Architecture, LayerShape, LinearSpec, expected_shapes
from compress.model.resize import accepted_kv_heads, resized_config
from compress.model.uneven import is_uneven, layer_shapes, plain_config

__all__ = [
    "Architecture",
    "LayerShape",
    "LinearSpec",
    "Role",
    "accepted_kv_heads",
    "architecture_of",
    "expected_shapes",
    "resized_config",
]


def architecture_of(config: Mapping[str, Any], names: Iterable[str] | None = None) -> Architecture:
    """Read the architecture from a config.json's content; families without a declaration are traced.

    The layers of an uneven model (see `compress.model.uneven`) are in ``layer_shapes``.

    Args:
        config: The content of config.json.
        names: Tensor names of the checkpoint; when given, every expected linear must be among them.

    Raises:
        CompressError: The config is invalid, the checkpoint is quantized by another method, the model is no
            dense decoder that can be understood, or tensors are missing. The sentence names what is missing.
    """
    refuse_quantized(config)
    if names is not None:
        names = frozenset(names)
        _check_depth(config, len(names))
    built = build_config(plain_config(config))
    refuse_experts(built)
    family = family_of(str(built.model_type))
    if family is None:
        from compress.model.traced import trace_architecture  # heavy, and needed for unknown families only

        architecture = trace_architecture(built)
    else:
        linears = tuple(
            LinearSpec(
                name=p.name,
                role=p.role,
                bias=bool(getattr(built, p.bias, False)) if isinstance(p.bias, str) else p.bias,
            )
            for p in family.linears
        )
        heads = int(built.num_attention_heads)
        architecture = Architecture(
            family=family.model_type,
            hidden=int(built.hidden_size),
            layers=int(built.num_hidden_layers),
            heads=heads,
            kv_heads=int(getattr(built, "num_key_value_heads", None) or heads),
            head_dim=int(getattr(built, "head_dim", None) or built.hidden_size // heads),
            channels=int(built.intermediate_size),
            vocab=int(built.vocab_size),
            tied=bool(built.tie_word_embeddings),
            linears=linears,
        )
    if architecture.heads % architecture.kv_heads:
        raise CompressError(
            f"The config has {architecture.heads} query heads for {architecture.kv_heads} key/value heads.",
            "Use a model whose query heads divide evenly among the key/value heads.",
        )
    if is_uneven(config):
        full = LayerShape(
            kv_heads=architecture.kv_heads,
            queries=architecture.queries_per_group,
            channels=architecture.channels,
        )
        architecture = replace(architecture, layer_shapes=layer_shapes(config, full, architecture.layers))
    if names is not None:
        _check_names(architecture, frozenset(names))
    return architecture


def _check_depth(config: Mapping[str, Any], tensors: int) -> None:
    """Refuse more layers than there are tensors, before anything is made for each of them."""
    for key in ("num_hidden_layers", "n_layer", "n_layers", "num_layers"):
        layers = config.get(key)
        if isinstance(layers, int | float) and layers > tensors:
            raise CompressError(
                f"The config has {shown(layers)} layers ({key}) and the checkpoint {tensors} tensors.",
                "Use a checkpoint whose config.json belongs to its weights.",
            )


def _elsewhere(arch: Architecture, name: str, names: frozenset[str]) -> bool:
    """Whether another layer has the tensor that a layer lacks which is there otherwise."""
    for layer in range(arch.layers):
        prefix = arch.layer_prefix.format(layer=layer)
        if name.startswith(prefix):
            rest = name.removeprefix(prefix)
            there = any(other.startswith(prefix) for other in names)
            return there and any(
                arch.layer_prefix.format(layer=i) + rest in names for i in range(arch.layers)
            )
    return False


def _check_names(arch: Architecture, names: frozenset[str]) -> None:
    required = [arch.embedding] if arch.tied else [arch.embedding, arch.lm_head]
    surplus: list[str] = []
    for layer in range(arch.layers):
        here = arch.linears_at(layer)
        for linear in arch.linears:
            weight, bias = arch.tensor_name(layer, linear), arch.tensor_name(layer, linear, "bias")
            (required if linear in here else surplus).append(weight)
            (required if linear in here and linear.bias else surplus).append(bias)
    missing = [name for name in required if name not in names]
    alone = [name for name in missing if _elsewhere(arch, name, names)]
    if missing and len(alone) == len(missing):
        raise CompressError(
            f"The checkpoint holds {len(alone)} weights of decoder layers under no name of their own, first "
            f"{alone[0]!r}: two modules share one tensor, which can be neither cut nor quantized for one of them, "
            "or the file is damaged.",
            "Give every layer its own copy of its weights and save the model again.",
        )
    if missing:
        raise CompressError(
            f"The checkpoint lacks {len(missing)} tensors of a {arch.family} model with {arch.layers} "
            f"layers, first {missing[0]!r}.",
            "Load the model with transformers, save it again with save_pretrained, and use that folder.",
        )
    unknown = [name for name in surplus if name in names]
    if unknown:
        raise CompressError(
            f"The checkpoint holds {unknown[0]!r}, but its config declares no such tensor.",
            "Use a checkpoint whose config.json belongs to its weights.",
        )
