"""Adapters that start from a part of their base: the base gives that part up."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from compress.adapters.adapter_file import AdapterFile
from compress.adapters.factors import factor_product
from compress.errors import CompressError
from compress.quantize.linear import LQLinear


def switch_off_factors(model: nn.Module, names: Iterable[str]) -> None:
    """Let the named LQ linears compute with their quantized part only."""
    for name in names:
        lq_linear(model, name).use_factors = False


@torch.no_grad()
def take_out(model: nn.Module, file: AdapterFile) -> None:
    """Subtract ``s B0 A0`` from the base weights that the adapter was started from.

    Raises:
        CompressError: None were kept.
    """
    for name in file.modules:
        initial = file.initial_factors(name)
        if initial is None:
            raise CompressError(
                f"The adapter {file.path} started from a part of its base, and no initial factors were kept.",
                "Load it with PEFT alone, or train it again.",
            )
        module: Any = model.get_submodule(name)
        part = factor_product(*initial, file.scaling(name).value)
        part = part.T if isinstance(module, Conv1D) else part
        module.weight.sub_(part.to(module.weight.device, module.weight.dtype))


def lq_linear(model: nn.Module, name: str) -> LQLinear:
    """A linear of an LQ model.

    Raises:
        CompressError: It is another kind of linear.
    """
    module = model.get_submodule(name)
    if not isinstance(module, LQLinear):
        raise CompressError(f"{name} is not an LQ linear.", "Quantize the model first, or attach a LoRA.")
    return module
