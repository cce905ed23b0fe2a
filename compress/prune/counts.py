"""Parameter counts: of a shape, of a structure, and by the formula the LoRAM paper's tables follow."""

from __future__ import annotations

from fractions import Fraction

from compress.model.architecture import Architecture
from compress.structure import StructureMap, kept_columns, kept_rows


def kept_linear_parameters(arch: Architecture, structure: StructureMap) -> int:
    """Decoder linear weights (no biases) that ``structure`` keeps."""
    total = 0
    for layer in structure.layers:
        for spec in arch.linears:
            rows, columns = arch.linear_shape(spec)
            row_index, column_index = kept_rows(arch, spec, layer), kept_columns(arch, spec, layer)
            kept = rows if row_index is None else len(row_index)
            total += kept * (columns if column_index is None else len(column_index))
    return total


def published_kept(arch: Architecture, ratio: float) -> tuple[int, int]:
    """(KV heads, channels) a pruned layer keeps at ``ratio`` in LoRAM's tables (arXiv 2502.13533).

    The floors are taken in exact arithmetic of the decimal ``ratio``, so that 1 - 0.9 is 0.1.
    """
    keep = 1 - Fraction(str(ratio))
    width = arch.kv_heads * arch.head_dim
    removed_heads = (width - int(width * keep)) // arch.head_dim
    return arch.kv_heads - removed_heads, int(arch.channels * keep)


def published_parameters(arch: Architecture, ratio: float, *, skip_first: int = 4, skip_last: int = 2) -> int:
    """All parameters of a bias-free gated model pruned by LoRAM's convention (arXiv 2502.13533).

    The first ``skip_first`` and the last ``skip_last`` layers stay whole; input embedding and lm_head both
    count.
    """
    kv_heads, channels = published_kept(arch, ratio)
    pruned_layers = max(0, arch.layers - skip_first - skip_last)
    total = 2 * arch.vocab * arch.hidden + (2 * arch.layers + 1) * arch.hidden
    for count, kv, ffn in (
        (pruned_layers, kv_heads, channels),
        (arch.layers - pruned_layers, arch.kv_heads, arch.channels),
    ):
        queries = kv * arch.queries_per_group
        attention = 2 * arch.hidden * (queries + kv) * arch.head_dim
        total += count * (attention + 3 * arch.hidden * ffn)
    return total


def published_quantized_reduction(full: int, pruned: int) -> float:
    """LoRAM's reduction with a 4-bit base: ``4 * full / pruned``, every parameter at 4 instead of 16 bits.

    It ignores scales and embeddings that stay in 16 bit: report stored bits and measured bytes beside it.
    """
    return 4 * full / pruned
