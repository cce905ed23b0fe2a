"""Half-quadratic quantization, for `environment_runner`; runs in hqq's own environment."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM


def load(model: Path, settings: dict[str, Any]) -> Any:
    """The dense model."""
    import_module("hqq.core.quantize")
    return AutoModelForCausalLM.from_pretrained(str(model), dtype="auto", local_files_only=True)


@torch.no_grad()
def quantize(loaded: Any, ids_NS: None, linears: list[str], settings: dict[str, Any]) -> dict[str, Any]:
    """An ``HQQLinear`` for every linear, with hqq's defaults but for the axis of the groups."""
    core = import_module("hqq.core.quantize")
    config = core.BaseQuantizeConfig(
        nbits=settings["bits"], group_size=settings["group_size"], axis=settings["axis"]
    )
    return {
        name: core.HQQLinear(
            loaded.get_submodule(name), config, del_orig=False, compute_dtype=torch.float16, device="cpu"
        )
        for name in linears
    }


def save(quantized: dict[str, Any], folder: Path) -> None:
    """The modules' own state, which hqq encodes for this format; other weights are left out."""
    state = {f"{name}.{key}": value for name, m in quantized.items() for key, value in m.state_dict().items()}
    save_file({key: value.contiguous() for key, value in state.items()}, folder / "model.safetensors")


def reopen(folder: Path, model: Path, linears: list[str], settings: dict[str, Any]) -> dict[str, Any]:
    """The modules, filled from the file."""
    core = import_module("hqq.core.quantize")
    state = load_file(folder / "model.safetensors")
    modules = {}
    for name in linears:
        prefix = f"{name}."
        own = {key.removeprefix(prefix): state[key] for key in state if key.startswith(prefix)}
        modules[name] = core.HQQLinear(None, None, compute_dtype=torch.float16, device="cpu")
        modules[name].load_state_dict(own)
    return modules


@torch.no_grad()
def weight(module: Any) -> torch.Tensor:
    """Its own dequantization, of the stored 16-bit scales and zeros but in float32."""
    quantizer = import_module("hqq.core.quantize").Quantizer
    meta = dict(module.meta) | {"compute_dtype": torch.float32}
    meta |= {key: meta[key].float() for key in ("scale", "zero")}
    weight_OI: torch.Tensor = quantizer.dequantize(module.W_q, meta)
    return weight_OI


def dtype(module: Any) -> torch.dtype:
    """What the module computes in."""
    kind: torch.dtype = module.compute_dtype
    return kind
