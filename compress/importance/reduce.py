"""From sums over rows or columns of one linear to scores of KV groups and channels."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import nn

from compress.importance.base import GroupScores, LayerScores
from compress.importance.modules import decoder_linear
from compress.model.architecture import Architecture, LinearSpec
from compress.structure import ATTENTION_ROLES


def row_chunks(weight_OI: torch.Tensor, chunk_elements: int | None = None) -> Iterator[slice]:
    """Slices of consecutive rows of at most ``chunk_elements`` elements each (at least one row).

    None: 1 MiB of float32 on a CPU, where a chunk that stays in the cache is several times faster, and
    64 MiB elsewhere.
    """
    rows, columns = weight_OI.shape
    if chunk_elements is None:
        chunk_elements = 1 << 18 if weight_OI.device.type == "cpu" else 1 << 24
    step = max(1, chunk_elements // max(1, columns))
    for start in range(0, rows, step):
        yield slice(start, min(rows, start + step))


def segments(arch: Architecture, spec: LinearSpec, sums: torch.Tensor) -> list[torch.Tensor]:
    """Group vectors of one linear, one for each unfused linear in it.

    Args:
        arch: The architecture.
        spec: The linear.
        sums: Importance summed over each output row [out], or over each input column [in] for o and down.

    Returns:
        Vectors [kv_heads] for attention roles, [channels] for MLP roles.
    """
    if spec.role in ATTENTION_ROLES:
        queries, keys = arch.heads * arch.head_dim, arch.kv_heads * arch.head_dim
        parts = sums.split([queries, keys, keys]) if spec.role == "qkv" else [sums]
        return [part.view(arch.kv_heads, -1).sum(dim=1) for part in parts]
    return list(sums.split(arch.channels))


def group_scores(
    model: nn.Module,
    arch: Architecture,
    sums_of: Callable[[nn.Module, LinearSpec, str], torch.Tensor],
    *,
    normalize: bool,
) -> GroupScores:
    """Scores of every layer from the sums of each linear (METHODS: normalise per linear, add over the group).

    Args:
        model: Plain or PEFT model.
        arch: Its architecture.
        sums_of: Gives ``sums`` of :func:`segments` for (module, spec, module name).
        normalize: Divide each vector by its L2 norm first. A vector of zeros stays zero.
    """
    layers = []
    for layer in range(arch.layers):
        kv_groups = torch.zeros(arch.kv_heads, dtype=torch.float64)
        channels = torch.zeros(arch.channels, dtype=torch.float64)
        for spec in arch.linears:
            module = decoder_linear(model, arch, layer, spec)
            sums = sums_of(module, spec, arch.module_name(layer, spec)).cpu().double()
            for vector in segments(arch, spec, sums):
                norm = vector.norm()
                scaled = vector / norm if normalize and norm > 0 else vector
                if spec.role in ATTENTION_ROLES:
                    kv_groups += scaled
                else:
                    channels += scaled
        layers.append(LayerScores(kv_groups=kv_groups, channels=channels))
    return GroupScores(layers=tuple(layers))
