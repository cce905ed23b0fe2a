"""The sizes of a decoder, and the names, roles and shapes of its linears."""

from __future__ import annotations

from dataclasses import dataclass

from compress.model.config import Shapes
from compress.model.family import Role


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
