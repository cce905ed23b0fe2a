"""GPTQModel's GPTQ, for `environment_runner`; runs in GPTQModel's own environment."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import torch


def load(model: Path, settings: dict[str, Any]) -> Any:
    """The dense model, and the packing kernel built where it can be: compilation is no part of quantization."""
    gptqmodel = import_module("gptqmodel")
    import_module("gptqmodel.extension").is_available("pack_block_cpu")
    config = gptqmodel.GPTQConfig(
        bits=settings["bits"],
        group_size=settings["group_size"],
        sym=settings["symmetric"],
        offload_to_disk=False,
    )
    return gptqmodel.GPTQModel.load(str(model), config, device="cpu")


def quantize(loaded: Any, ids_NS: torch.Tensor, linears: list[str], settings: dict[str, Any]) -> Any:
    """GPTQ with GPTQModel's defaults but for the zero points, one window a sample."""
    samples = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in ids_NS.tolist()]
    loaded.quantize(samples, batch_size=1)
    return loaded


def save(quantized: Any, folder: Path) -> None:
    """The checkpoint in GPTQ's common format."""
    quantized.save(str(folder))


def reopen(folder: Path, model: Path, linears: list[str], settings: dict[str, Any]) -> dict[str, Any]:
    """Its torch modules, in float16 as the scales are stored; by default they would be cut to bfloat16."""
    gptqmodel = import_module("gptqmodel")
    network = gptqmodel.GPTQModel.load(
        str(folder), device="cpu", dtype=torch.float16, backend=gptqmodel.BACKEND.TORCH
    )
    return {name: network.model.get_submodule(name) for name in linears}


@torch.no_grad()
def weight(module: Any) -> torch.Tensor:
    """Codes less zeros times scales; the scales widened, since the module would round the product to 16 bits."""
    scales = module.scales
    module.scales = scales.float()
    weight_OI: torch.Tensor = module.dequantize_weight().T
    module.scales = scales
    return weight_OI


def dtype(module: Any) -> torch.dtype:
    """What the module computes in."""
    kind: torch.dtype = module.scales.dtype
    return kind
