"""Reach a model's decoder linears, their weights and LoRA factors, through PEFT wrappers or without them."""

from __future__ import annotations

from dataclasses import dataclass

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
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model
    module: nn.Module = plain.get_submodule(arch.module_name(layer, spec))
    return module


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
    if not hasattr(module, "lora_A") or module.merged:
        return None
    adapters = [adapter for adapter in module.active_adapters if adapter in module.lora_A]
    if not adapters:
        return None
    if len(adapters) > 1:
        raise CompressError(
            f"{name} has {len(adapters)} active adapters ({', '.join(adapters)}).",
            "Activate one adapter before scoring.",
        )
    (adapter,) = adapters
    if adapter in module.lora_variant:
        raise CompressError(f"The adapter of {name} is not a plain LoRA.", "Attach a LoRA without DoRA.")
    return LoraFactors(
        a=module.lora_A[adapter].weight,
        b=module.lora_B[adapter].weight,
        scaling=float(module.scaling[adapter]),
    )
