"""What a decoder is made of: sizes, tensor names and roles, read from its config alone."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from compress.errors import CompressError
from compress.model.config import (
    Shapes,
    build_config,
    meta_shapes,
    refuse_experts,
    refuse_quantized,
    shallow_config,
)
from compress.model.family import Fallback, Role, family_of

__all__ = [
    "Architecture",
    "LinearSpec",
    "Role",
    "accepted_kv_heads",
    "architecture_of",
    "expected_shapes",
    "resized_config",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearSpec:
    """One linear of every decoder layer.

    Args:
        name: Module name relative to the layer, "self_attn.q_proj".
        role: What it does; the rows of "qkv" and "gate_up" are [q; k; v] and [gate; up] stacked.
        bias: Whether it has a bias.
        transposed: Whether the weight is stored [in, out] (Conv1D) instead of [out, in].
    """

    name: str
    role: Role
    bias: bool = False
    transposed: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """Sizes and names of a dense decoder whose layers all have the same shapes.

    ``linears`` are the linears of one layer that pruning and quantization work on. ``heads_key``,
    ``kv_heads_key`` and ``channels_key`` are where the config keeps those sizes. ``heads_reason`` and
    ``channels_reason`` say why a unit cannot be pruned, for an error message.
    """

    family: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    channels: int
    vocab: int
    tied: bool
    linears: tuple[LinearSpec, ...]
    layer_prefix: str = "model.layers.{layer}."
    embedding: str = "model.embed_tokens.weight"
    lm_head: str = "lm_head.weight"
    prunable_heads: bool = True
    prunable_channels: bool = True
    heads_reason: str = ""
    channels_reason: str = ""
    heads_key: str = "num_attention_heads"
    kv_heads_key: str = "num_key_value_heads"
    channels_key: str = "intermediate_size"

    @property
    def queries_per_group(self) -> int:
        """Query heads that read one key/value head."""
        return self.heads // self.kv_heads

    def module_name(self, layer: int, linear: LinearSpec) -> str:
        """Full module name, "model.layers.3.self_attn.q_proj"."""
        return self.layer_prefix.format(layer=layer) + linear.name

    def tensor_name(self, layer: int, linear: LinearSpec, kind: str = "weight") -> str:
        """Full tensor name, "model.layers.3.self_attn.q_proj.weight"."""
        return f"{self.module_name(layer, linear)}.{kind}"

    def linear_shape(self, linear: LinearSpec) -> tuple[int, int]:
        """(out, in) of a linear, however it is stored."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        rows = {
            "q": q,
            "k": kv,
            "v": kv,
            "qkv": q + 2 * kv,
            "gate": self.channels,
            "up": self.channels,
            "gate_up": 2 * self.channels,
        }
        columns = {"o": q, "down": self.channels}
        return rows.get(linear.role, self.hidden), columns.get(linear.role, self.hidden)

    def stored_shape(self, linear: LinearSpec) -> tuple[int, int]:
        """The weight's shape as it is stored: [out, in], or [in, out] when transposed."""
        out, into = self.linear_shape(linear)
        return (into, out) if linear.transposed else (out, into)

    def decoder_linear_parameters(self) -> int:
        """Weights (no biases) of all linears of all decoder layers."""
        sizes = map(self.linear_shape, self.linears)
        return self.layers * sum(out * into for out, into in sizes)


def architecture_of(config: Mapping[str, Any], names: Iterable[str] | None = None) -> Architecture:
    """Read the architecture from a config.json's content; families without a declaration are traced.

    Args:
        config: The content of config.json.
        names: Tensor names of the checkpoint; when given, every expected linear must be among them.

    Raises:
        CompressError: The config is invalid, the checkpoint is quantized by another method, the model is no
            dense decoder that can be understood, or tensors are missing. The sentence names what is missing.
    """
    refuse_quantized(config)
    built = build_config(config)
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
    if names is not None:
        _check_names(architecture, frozenset(names))
    return architecture


def _check_names(arch: Architecture, names: frozenset[str]) -> None:
    required = [arch.embedding] if arch.tied else [arch.embedding, arch.lm_head]
    surplus = []
    for layer in range(arch.layers):
        for linear in arch.linears:
            required.append(arch.tensor_name(layer, linear))
            (required if linear.bias else surplus).append(arch.tensor_name(layer, linear, "bias"))
    missing = [name for name in required if name not in names]
    if missing:
        raise CompressError(
            f"The checkpoint lacks {len(missing)} tensors of a {arch.family} model with {arch.layers} layers, "
            f"first {missing[0]!r}.",
            "Load the model with transformers, save it again with save_pretrained, and use that folder.",
        )
    unknown = [name for name in surplus if name in names]
    if unknown:
        raise CompressError(
            f"The checkpoint holds {unknown[0]!r}, but its config declares no such bias.",
            "Use a checkpoint whose config.json belongs to its weights.",
        )


def expected_shapes(arch: Architecture) -> Shapes:
    """Name and stored shape of every linear's weight and bias, and of the embedding (and untied lm_head)."""
    shapes: Shapes = {arch.embedding: (arch.vocab, arch.hidden)}
    if not arch.tied:
        shapes[arch.lm_head] = (arch.vocab, arch.hidden)
    for layer in range(arch.layers):
        for linear in arch.linears:
            shapes[arch.tensor_name(layer, linear)] = arch.stored_shape(linear)
            if linear.bias:
                shapes[arch.tensor_name(layer, linear, "bias")] = (arch.linear_shape(linear)[0],)
    return shapes


def resized_config(
    config: Mapping[str, Any], arch: Architecture, *, heads: int, kv_heads: int, channels: int
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
            works = ", ".join(map(str, accepted_kv_heads(config, arch)))
            raise CompressError(
                f"transformers does not load a {arch.family} model with {heads} heads: {error.cause}",
                f"Keep one of these numbers of key/value heads instead: {works}.",
            ) from error
        changed = fallback
        built = build_config(changed)
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


def accepted_kv_heads(config: Mapping[str, Any], arch: Architecture) -> tuple[int, ...]:
    """The numbers of key/value heads (all their query heads kept) that a config class takes, ascending."""
    if not arch.prunable_heads:
        return (arch.kv_heads,)
    accepted = []
    for count in range(1, arch.kv_heads + 1):
        changed = dict(config) | {
            arch.heads_key: count * arch.queries_per_group,
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
    return full if _builds(full) else None


def _check_sizes(arch: Architecture, heads: int, kv_heads: int, channels: int) -> None:
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
    if not arch.prunable_heads and (heads, kv_heads) != (arch.heads, arch.kv_heads):
        raise CompressError(
            f"Attention heads cannot be pruned: {arch.heads_reason}.", "Prune MLP channels only."
        )
    if not arch.prunable_channels and channels != arch.channels:
        raise CompressError(f"MLP channels cannot be pruned: {arch.channels_reason}.", "Prune heads only.")
