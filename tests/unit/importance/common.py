"""What the tests of criteria compare with: scores written out with whole matrices and loops over heads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from compress.importance.base import GroupScores, LayerScores
from compress.importance.modules import decoder_linear
from compress.model.architecture import Architecture

Matrices = list[dict[str, torch.Tensor]]
"""For each layer: role -> [out, in], fused linears split."""


def vectors(scores: GroupScores) -> torch.Tensor:
    """All scores of a model in one vector."""
    return torch.cat(list(scores.to_tensors().values()))


def matrices(model: Any, arch: Architecture, read: Callable[[Any], torch.Tensor]) -> Matrices:
    """``read(module)`` [out, in] of every decoder linear in float64, fused ones split into their parts."""
    layers = []
    for layer in range(arch.layers):
        parts = {}
        for spec in arch.linears:
            value = read(decoder_linear(model, arch, layer, spec)).detach().double()
            if spec.role == "qkv":
                keys = arch.kv_heads * arch.head_dim
                split = value.split([arch.heads * arch.head_dim, keys, keys])
                parts |= dict(zip("qkv", split, strict=True))
            elif spec.role == "gate_up":
                parts |= dict(zip(("gate", "up"), value.chunk(2), strict=True))
            else:
                parts[spec.role] = value
        layers.append(parts)
    return layers


def dense_scores(
    elements: Matrices,
    arch: Architecture,
    *,
    normalize: bool,
    reduce: Callable[[torch.Tensor], torch.Tensor] = torch.sum,
) -> GroupScores:
    """Scores from the importance of every element: slice by slice with ``reduce``, then normalised and added."""
    hd, per_group = arch.head_dim, arch.heads // arch.kv_heads
    wide = per_group * hd

    def total(slices: dict[str, list[torch.Tensor]], size: int) -> torch.Tensor:
        result = torch.zeros(size, dtype=torch.float64)
        for parts in slices.values():
            vector = torch.stack([reduce(part) for part in parts])
            result += vector / vector.norm() if normalize else vector
        return result

    layers = []
    for e in elements:
        groups: dict[str, list[torch.Tensor]] = {}
        heads: dict[str, list[torch.Tensor]] = {}
        for role in {"q", "k", "v", "o"} & set(e):
            matrix = e[role].T if role == "o" else e[role]
            width = wide if role in ("q", "o") else hd
            groups[role] = [matrix[g * width : (g + 1) * width] for g in range(arch.kv_heads)]
            if role in ("q", "o"):
                heads[role] = [matrix[h * hd : (h + 1) * hd] for h in range(arch.heads)]
        channels = {
            role: list(e[role].T if role == "down" else e[role]) for role in {"gate", "up", "down"} & set(e)
        }
        layers.append(
            LayerScores(
                kv_groups=total(groups, arch.kv_heads),
                channels=total(channels, arch.channels),
                query_heads=total(heads, arch.heads),
            )
        )
    return GroupScores(layers=tuple(layers))


def linear_inputs(model: Any, arch: Architecture, ids: torch.Tensor) -> list[dict[str, torch.Tensor]]:
    """For each layer: role -> inputs [tokens, in] in float64, from one forward pass of a float64 copy."""
    found: list[dict[str, torch.Tensor]] = [{} for _ in range(arch.layers)]
    handles = []
    for layer in range(arch.layers):
        for spec in arch.linears:
            roles = {"qkv": ("q", "k", "v"), "gate_up": ("gate", "up")}.get(spec.role, (spec.role,))

            def keep(_: Any, args: Any, layer: int = layer, roles: tuple[str, ...] = roles) -> None:
                for role in roles:
                    found[layer][role] = args[0].detach().double().reshape(-1, args[0].shape[-1])

            handles.append(decoder_linear(model, arch, layer, spec).register_forward_pre_hook(keep))
    with torch.no_grad():
        model(input_ids=ids)
    for handle in handles:
        handle.remove()
    return found


class Allocations(TorchDispatchMode):
    """Watches every operation for memory it takes: ``largest`` is the most elements of one new tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        known = {
            t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)
        }
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in known:
                self.largest = max(self.largest, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result
