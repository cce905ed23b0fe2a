"""bitsandbytes' 4-bit NormalFloat, for `environment_runner`; runs in bitsandbytes' own environment."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM


def load(model: Path, settings: dict[str, Any]) -> Any:
    """The dense model in float32: every 16-bit weight is one, and dequantization then rounds nothing."""
    import_module("bitsandbytes")
    return AutoModelForCausalLM.from_pretrained(str(model), dtype=torch.float32, local_files_only=True)


@torch.no_grad()
def quantize(loaded: Any, ids_NS: None, linears: list[str], settings: dict[str, Any]) -> dict[str, Any]:
    """A ``Linear4bit`` for every linear."""
    bitsandbytes = import_module("bitsandbytes")
    modules = {}
    for name in linears:
        linear = loaded.get_submodule(name)
        module = bitsandbytes.nn.Linear4bit(
            linear.in_features, linear.out_features, bias=linear.bias is not None, quant_type="nf4"
        )
        module.weight = bitsandbytes.nn.Params4bit(
            linear.weight.data,
            quant_type="nf4",
            blocksize=settings["group_size"],
            compress_statistics=settings["double_quantization"],
            module=module,
        )
        module.bias = linear.bias
        modules[name] = module.to("cpu")  # this is what quantizes
    return modules


def save(quantized: dict[str, Any], folder: Path) -> None:
    """The modules' own state; other weights are left out."""
    state = {f"{name}.{key}": value for name, m in quantized.items() for key, value in m.state_dict().items()}
    save_file({key: value.contiguous() for key, value in state.items()}, folder / "model.safetensors")


def reopen(folder: Path, model: Path, linears: list[str], settings: dict[str, Any]) -> dict[str, Any]:
    """The modules, filled from the file."""
    bitsandbytes = import_module("bitsandbytes")
    state = load_file(folder / "model.safetensors")
    modules = {}
    for name in linears:
        codes, bias = state[f"{name}.weight"], state.get(f"{name}.bias")
        prefix = f"{name}.weight."
        statistics = {key.removeprefix(prefix): state[key] for key in state if key.startswith(prefix)}
        module = bitsandbytes.nn.Linear4bit(1, 1, bias=False, quant_type="nf4")
        module.weight = bitsandbytes.nn.Params4bit.from_prequantized(
            codes, statistics, device="cpu", module=module
        )
        module.bias = None if bias is None else torch.nn.Parameter(bias)
        modules[name] = module
    return modules


@torch.no_grad()
def weight(module: Any) -> torch.Tensor:
    """Its own dequantization, in float32."""
    functional = import_module("bitsandbytes.functional")
    weight_OI: torch.Tensor = functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
    return weight_OI


def dtype(module: Any) -> torch.dtype:
    """What the module computes in."""
    return torch.float32
