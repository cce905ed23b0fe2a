"""From the importance of elements to sums over rows or columns, and from those to scores of groups."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal

import torch
from torch import nn

from compress.importance.base import GroupScores, LayerScores
from compress.importance.modules import WeightRows, decoder_layer, decoder_linear
from compress.model.architecture import Architecture, LinearSpec
from compress.model.resident import resident
from compress.structure import ATTENTION_ROLES, ROW_ROLES

Axis = Literal["rows", "columns"]


def row_chunks(weight: WeightRows, chunk_elements: int | None = None) -> Iterator[slice]:
    """Slices of consecutive rows of at most ``chunk_elements`` elements each (at least one row).

    None: 512 KiB of float32 on a CPU, where a chunk that stays in the cache is several times faster, and
    64 MiB elsewhere.
    """
    rows, columns = weight.shape
    if chunk_elements is None:
        chunk_elements = 1 << 17 if weight.device.type == "cpu" else 1 << 24
    step = max(1, chunk_elements // max(1, columns))
    for start in range(0, rows, step):
        yield slice(start, min(rows, start + step))


def axis_of(spec: LinearSpec) -> Axis:
    """What of a linear belongs to groups: its output rows, or the input columns of o and down."""
    return "rows" if spec.role in ROW_ROLES else "columns"


def chunked_sums(
    weight: WeightRows,
    element: Callable[[slice], torch.Tensor],
    *,
    over: Axis,
    chunk_elements: int | None = None,
) -> torch.Tensor:
    """Importance of a linear's elements, summed over each row [out] or each column [in].

    Args:
        weight: The weight, for its sizes.
        element: Slice of rows -> importance of their elements [rows, in].
        over: "rows": one sum for each output row; "columns": one for each input column.
        chunk_elements: See :func:`row_chunks`; no importance exists for more than one chunk.

    Returns:
        Sums of ``weight.dtype`` on its device.
    """
    rows, columns = weight.shape
    sums = torch.zeros(rows if over == "rows" else columns, dtype=weight.dtype, device=weight.device)
    for chunk in row_chunks(weight, chunk_elements):
        if over == "rows":
            sums[chunk] = element(chunk).sum(dim=1)
        else:
            sums += element(chunk).sum(dim=0)
    return sums


def segments(arch: Architecture, spec: LinearSpec, sums: torch.Tensor) -> list[torch.Tensor]:
    """Group vectors of one linear, one for each unfused linear in it.

    Args:
        arch: The sizes of the linear's layer.
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


def query_segment(arch: Architecture, spec: LinearSpec, sums: torch.Tensor) -> torch.Tensor | None:
    """The vector [heads] of a linear with a slice for each query head (q, its part of qkv, o), else None."""
    if spec.role not in ("q", "qkv", "o"):
        return None
    return sums[: arch.heads * arch.head_dim].view(arch.heads, -1).sum(dim=1)


def group_scores(
    model: nn.Module,
    arch: Architecture,
    sums_of: Callable[[nn.Module, LinearSpec, str], torch.Tensor | None],
    *,
    normalize: bool,
    absolute: bool = False,
) -> GroupScores:
    """Scores of every layer from the sums of each linear: normalise per linear, add over the group.

    Args:
        model: Plain or PEFT model.
        arch: Its architecture.
        sums_of: Gives ``sums`` of :func:`segments` for (module, spec, module name); None leaves a linear out.
        normalize: Divide each vector by its L2 norm first. A vector of zeros stays zero.
        absolute: The sums have signs: take the absolute value of each group's sum before anything else.
    """

    def prepared(vector: torch.Tensor) -> torch.Tensor:
        vector = vector.abs() if absolute else vector
        norm = vector.norm()
        return vector / norm if normalize and norm > 0 else vector

    layers = []
    for layer in range(arch.layers):
        here = arch.at(layer)
        kv_groups = torch.zeros(here.kv_heads, dtype=torch.float64)
        channels = torch.zeros(here.channels, dtype=torch.float64)
        query_heads = torch.zeros(here.heads, dtype=torch.float64)
        with resident(decoder_layer(model, arch, layer)):
            every = {
                spec: sums_of(decoder_linear(model, arch, layer, spec), spec, arch.module_name(layer, spec))
                for spec in arch.linears_at(layer)
            }
        for spec, found in every.items():
            if found is None:
                continue
            sums = found.cpu().double()
            total = kv_groups if spec.role in ATTENTION_ROLES else channels
            for vector in segments(here, spec, sums):
                total += prepared(vector)
            queries = query_segment(here, spec, sums)
            if queries is not None:
                query_heads += prepared(queries)
        layers.append(LayerScores(kv_groups=kv_groups, channels=channels, query_heads=query_heads))
    return GroupScores(layers=tuple(layers))
