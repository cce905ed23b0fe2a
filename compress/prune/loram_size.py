"""The size of a model pruned as LoRAM prunes (arXiv 2502.13533 §4), from its architecture alone."""

from __future__ import annotations

from dataclasses import dataclass, replace

from compress.errors import UsageError
from compress.model.architecture import Architecture, LayerShape
from compress.prune.counts import published_kept, published_quantized_reduction
from compress.prune.local import pruned_layers

SKIP_FIRST, SKIP_LAST = 4, 2
"""Layers that LoRAM leaves whole."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SmallSize:
    """What a pruned model has, and the full one beside it.

    Attributes:
        arch: Its architecture; layers may differ.
        ratio: What every pruned layer loses of its heads and of its channels; 0: the full model.
        whole_layers: Layers that are not pruned.
        linears: Weights of the decoder linears.
        others: All other parameters: embeddings, output matrix, norms, biases.
        full: Parameters of the full model.
    """

    arch: Architecture
    ratio: float
    whole_layers: int
    linears: int
    others: int
    full: int

    @property
    def parameters(self) -> int:
        """All parameters."""
        return self.linears + self.others

    @property
    def reduction(self) -> float:
        """Parameters of the full model over ours."""
        return self.full / self.parameters

    @property
    def paper_reduction(self) -> float:
        """The paper's convention for a quantized base: every parameter at 4 instead of 16 bits, no overhead."""
        return published_quantized_reduction(self.full, self.parameters)

    def weight_bytes(self, bits: float, *, others: float = 16.0) -> float:
        """Bytes of the weights with the linears at ``bits`` (all overhead included), everything else at ``others``."""
        return (bits * self.linears + others * self.others) / 8

    def stored_bits(self, bits: float) -> float:
        """Stored bits per parameter, counted as in ``weight_bytes``."""
        return 8 * self.weight_bytes(bits) / self.parameters

    def stored_reduction(self, bits: float) -> float:
        """Bytes of the full model in 16 bits over ours, counted as in ``weight_bytes``."""
        return 2 * self.full / self.weight_bytes(bits)


def small_size(
    arch: Architecture,
    parameters: int,
    ratio: float,
    *,
    skip_first: int = SKIP_FIRST,
    skip_last: int = SKIP_LAST,
) -> SmallSize:
    """The size of a model of ``parameters`` parameters once it is pruned by ``ratio`` in LoRAM's convention.

    Args:
        arch: Of the full model.
        parameters: All of its parameters, a tied matrix once.
        ratio: Of heads and channels of a pruned layer; 0: nothing.
        skip_first: First layers left whole.
        skip_last: Last layers left whole.

    Raises:
        UsageError: A ratio outside of [0, 1), one that leaves a layer without heads or channels, or no layer to prune.
    """
    if not 0 <= ratio < 1:
        raise UsageError(f"A ratio of {ratio:g} is not in [0, 1).", "Give a fraction such as 0.85.")
    pruned = pruned_layers(arch.layers, skip_first, skip_last) if ratio else range(0)
    kv_heads, channels = published_kept(arch, ratio)
    if not kv_heads or not channels:
        raise UsageError(
            f"A ratio of {ratio:g} leaves {kv_heads} KV heads and {channels} channels.", "Give a smaller one."
        )
    full = LayerShape(kv_heads=arch.kv_heads, queries=arch.queries_per_group, channels=arch.channels)
    cut = replace(full, kv_heads=kv_heads, channels=channels)
    shapes = tuple(cut if layer in pruned else full for layer in range(arch.layers))
    small = replace(arch, layer_shapes=shapes)
    untouched = parameters - arch.decoder_linear_parameters() - _biases(arch)
    return SmallSize(
        arch=small,
        ratio=ratio,
        whole_layers=arch.layers - len(pruned),
        linears=small.decoder_linear_parameters(),
        others=untouched + _biases(small),
        full=parameters,
    )


def _biases(arch: Architecture) -> int:
    return sum(
        arch.at(layer).linear_shape(spec)[0]
        for layer in range(arch.layers)
        for spec in arch.linears_at(layer)
        if spec.bias
    )
