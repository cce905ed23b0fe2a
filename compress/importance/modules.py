"""Reach a model's decoder linears, their weights and LoRA factors, through PEFT wrappers or without them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from compress.errors import CompressError
from compress.model.architecture import Architecture, LinearSpec


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LoraFactors:
    """The active adapter of one linear: the layer computes ``x (W0 + scaling * B A)^T``.

    Attributes:
        a: LoRA A, parameter [r, in].
        b: LoRA B, parameter [out, r].
        scaling: alpha / r (or alpha / sqrt r for rsLoRA).
    """

    a: torch.Tensor
    b: torch.Tensor
    scaling: float


def decoder_linear(model: nn.Module, arch: Architecture, layer: int, spec: LinearSpec) -> nn.Module:
    """The module of a decoder linear as the forward pass calls it: the PEFT layer where there is one."""
    wrapped: Any = model
    plain: nn.Module = wrapped.get_base_model() if hasattr(model, "get_base_model") else model
    return plain.get_submodule(arch.module_name(layer, spec))


def base_weight(module: nn.Module, spec: LinearSpec) -> torch.Tensor:
    """The frozen weight of a decoder linear as a view [out, in], whatever wraps or transposes it."""
    base = module.get_submodule("base_layer") if hasattr(module, "base_layer") else module
    weight = base.get_parameter("weight").detach()
    return weight.t() if spec.transposed else weight


def lora_factors(module: nn.Module, name: str) -> LoraFactors | None:
    """The unmerged LoRA factors of a decoder linear, or None where it has no adapter.

    Raises:
        CompressError: Several adapters are active, or the adapter is not a plain LoRA (DoRA).
    """
    lora: Any = (
        module  # a peft layer, known by its attributes: PEFT has one class for each kind of base layer
    )
    if not hasattr(module, "lora_A") or lora.merged:
        return None
    adapters = [adapter for adapter in lora.active_adapters if adapter in lora.lora_A]
    if not adapters:
        return None
    if len(adapters) > 1:
        raise CompressError(
            f"{name} has {len(adapters)} active adapters ({', '.join(adapters)}).",
            "Activate one adapter before scoring.",
        )
    (adapter,) = adapters
    if adapter in lora.lora_variant:
        raise CompressError(f"The adapter of {name} is not a plain LoRA.", "Attach a LoRA without DoRA.")
    return LoraFactors(
        a=lora.lora_A[adapter].weight,
        b=lora.lora_B[adapter].weight,
        scaling=float(lora.scaling[adapter]),
    )
