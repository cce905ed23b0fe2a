"""The sizes of a decoder, and the names, roles and shapes of its linears."""

from __future__ import annotations

from dataclasses import dataclass, replace

from compress.model.family import Role

Shapes = dict[str, tuple[int, ...]]
"""Tensor name -> shape."""

ATTENTION_ROLES = frozenset({"q", "k", "v", "qkv", "o"})
"""Roles cut by whole KV groups or query heads; the others are cut by MLP channels."""


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
class LayerShape:
    """How much one decoder layer keeps; 0 KV groups or 0 channels means that the whole branch is gone.

    Attributes:
        kv_heads: KV groups.
        queries: Query heads in each of them.
        channels: MLP channels.
    """

    kv_heads: int
    queries: int
    channels: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """Sizes and names of a dense decoder.

    ``linears`` are the linears of one layer that pruning and quantization work on. ``heads_key``,
    ``kv_heads_key`` and ``channels_key`` are where the config keeps those sizes. ``heads_reason`` and
    ``channels_reason`` say why a unit cannot be pruned, for an error message.

    ``layer_shapes`` is given where the layers differ: ``heads``, ``kv_heads`` and ``channels`` are then those
    of the model it was cut from, and `at` and `linears_at` tell what one layer has.
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
    layer_shapes: tuple[LayerShape, ...] | None = None

    @property
    def queries_per_group(self) -> int:
        """Query heads that read one key/value head; 0 where there is none."""
        return self.heads // self.kv_heads if self.kv_heads else 0

    def at(self, layer: int) -> Architecture:
        """The architecture whose sizes are those of one layer; a branch that is gone has size 0."""
        if self.layer_shapes is None:
            return self
        shape = self.layer_shapes[layer]
        return replace(
            self,
            heads=shape.kv_heads * shape.queries,
            kv_heads=shape.kv_heads,
            channels=shape.channels,
            layer_shapes=None,
        )

    def linears_at(self, layer: int) -> tuple[LinearSpec, ...]:
        """The linears that a layer has: those of a branch that is gone are left out."""
        here = self.at(layer)
        return tuple(
            spec
            for spec in self.linears
            if (here.kv_heads if spec.role in ATTENTION_ROLES else here.channels) > 0
        )

    def gone(self) -> tuple[str, ...]:
        """Full names of the attention and MLP modules that layers have lost."""
        return tuple(
            self.layer_prefix.format(layer=layer) + self.branch(attention=attention)
            for layer in range(self.layers)
            for attention in (True, False)
            if not (self.at(layer).kv_heads if attention else self.at(layer).channels)
        )

    def branch(self, *, attention: bool) -> str:
        """The module that holds the attention's (or the MLP's) linears, in a layer; "" where it has none."""
        linears = (s for s in self.linears if (s.role in ATTENTION_ROLES) == attention)
        parents = {spec.name.rpartition(".")[0] for spec in linears}
        return parents.pop() if len(parents) == 1 else ""

    @property
    def embedding_module(self) -> str:
        """Full name of the embedding, "model.embed_tokens"."""
        return self.embedding.removesuffix(".weight")

    @property
    def head_module(self) -> str:
        """Full name of the output layer, "lm_head"."""
        return self.lm_head.removesuffix(".weight")

    def module_name(self, layer: int, linear: LinearSpec) -> str:
        """Full module name, "model.layers.3.self_attn.q_proj"."""
        return self.layer_prefix.format(layer=layer) + linear.name

    def tensor_name(self, layer: int, linear: LinearSpec, kind: str = "weight") -> str:
        """Full tensor name, "model.layers.3.self_attn.q_proj.weight"."""
        return f"{self.module_name(layer, linear)}.{kind}"

    def linear_shape(self, linear: LinearSpec) -> tuple[int, int]:
        """(out, in) of a linear, however it is stored. Where layers differ, ask ``at(layer)``."""
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
        sizes = (
            self.at(layer).linear_shape(s) for layer in range(self.layers) for s in self.linears_at(layer)
        )
        return sum(out * into for out, into in sizes)


def expected_shapes(arch: Architecture) -> Shapes:
    """Name and stored shape of every linear's weight and bias, and of the embedding (and untied lm_head)."""
    shapes: Shapes = {arch.embedding: (arch.vocab, arch.hidden)}
    if not arch.tied:
        shapes[arch.lm_head] = (arch.vocab, arch.hidden)
    for layer in range(arch.layers):
        here = arch.at(layer)
        for linear in arch.linears_at(layer):
            shapes[arch.tensor_name(layer, linear)] = here.stored_shape(linear)
            if linear.bias:
                shapes[arch.tensor_name(layer, linear, "bias")] = (here.linear_shape(linear)[0],)
    return shapes
