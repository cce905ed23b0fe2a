"""Reach a model's decoder linears, their weights and LoRA factors, through PEFT wrappers or without them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from compress.errors import CompressError
from compress.model.architecture import Architecture, LinearSpec
from compress.model.int8 import Int8Linear


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class WeightRows:
    """A weight [out, in] that is read a few rows at a time, however it is stored.

    Attributes:
        shape: (out, in).
        device: Where the rows are.
        dtype: Type of the rows: float32, or float64 where the weight is float64.
        rows: Slice of rows -> their values [rows, in]. They may share the weight's memory: do not write to them.
    """

    shape: tuple[int, int]
    device: torch.device
    dtype: torch.dtype
    rows: Callable[[slice], torch.Tensor]

    @classmethod
    def of(cls, weight_OI: torch.Tensor) -> WeightRows:
        """The rows of a matrix of any float dtype."""
        out, into = weight_OI.shape
        dtype = torch.float64 if weight_OI.dtype == torch.float64 else torch.float32
        return cls(
            shape=(out, into),
            device=weight_OI.device,
            dtype=dtype,
            rows=lambda chunk: weight_OI[chunk].to(dtype),
        )


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
    return plain_model(model).get_submodule(arch.module_name(layer, spec))


def decoder_layer(model: nn.Module, arch: Architecture, layer: int) -> nn.Module:
    """The module of a decoder layer."""
    return plain_model(model).get_submodule(arch.layer_prefix.format(layer=layer).rstrip("."))


def plain_model(model: nn.Module) -> nn.Module:
    """The model inside a PEFT wrapper, or the model itself."""
    wrapped: Any = model
    plain: nn.Module = wrapped.get_base_model() if hasattr(model, "get_base_model") else model
    return plain


def base_linear(module: nn.Module) -> nn.Module:
    """The frozen layer that holds the weight of a decoder linear."""
    return module.get_submodule("base_layer") if hasattr(module, "base_layer") else module


def float_weight(module: nn.Module, name: str) -> nn.Parameter:
    """The weight of decoder linear ``name`` as it is stored, no copy.

    Raises:
        CompressError: The weight is stored in codes, not in a float dtype.
    """
    weight = base_linear(module).get_parameter("weight")
    if not weight.is_floating_point():
        raise CompressError(
            f"The weight of {name} is quantized ({str(weight.dtype).removeprefix('torch.')} codes).",
            "Use this criterion on the model in 16 or 32 bit.",
        )
    return weight


def weight_rows(module: nn.Module, spec: LinearSpec, name: str) -> WeightRows:
    """The frozen weight of a decoder linear [out, in], whatever wraps, transposes or rounds it; never a copy.

    Raises:
        CompressError: The weight is quantized in a form other than :class:`Int8Linear`.
    """
    base = base_linear(module)
    if isinstance(base, Int8Linear):
        shape, device = (base.out_features, base.in_features), base.weight.device
        return WeightRows(shape=shape, device=device, dtype=torch.float32, rows=base.rows)
    weight = float_weight(module, name).detach()
    return WeightRows.of(weight.t() if spec.transposed else weight)


def merged_rows(module: nn.Module, spec: LinearSpec, name: str) -> WeightRows:
    """Like :func:`weight_rows`, with the active adapter added: the weight the forward pass multiplies with.

    Raises:
        CompressError: As :func:`weight_rows` and :func:`lora_factors`.
    """
    weight, factors = weight_rows(module, spec, name), lora_factors(module, name)
    if factors is None:
        return weight
    a, b, scaling = (*(f.detach().to(weight.dtype) for f in (factors.a, factors.b)), factors.scaling)
    return WeightRows(
        shape=weight.shape,
        device=weight.device,
        dtype=weight.dtype,
        rows=lambda chunk: torch.addmm(weight.rows(chunk), b[chunk], a, alpha=scaling),
    )


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
