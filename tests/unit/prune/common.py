"""What the tests of importance and pruning share."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from compress.importance.modules import decoder_linear
from compress.model.architecture import Architecture, LinearSpec, architecture_of
from compress.structure import LayerStructure

SPECS = (
    LinearSpec(name="self_attn.q_proj", role="q"),
    LinearSpec(name="self_attn.k_proj", role="k"),
    LinearSpec(name="self_attn.v_proj", role="v"),
    LinearSpec(name="self_attn.o_proj", role="o"),
    LinearSpec(name="mlp.gate_proj", role="gate"),
    LinearSpec(name="mlp.up_proj", role="up"),
    LinearSpec(name="mlp.down_proj", role="down"),
)
FUSED = (
    LinearSpec(name="self_attn.qkv_proj", role="qkv"),
    LinearSpec(name="self_attn.o_proj", role="o"),
    LinearSpec(name="mlp.gate_up_proj", role="gate_up"),
    LinearSpec(name="mlp.down_proj", role="down"),
)


def architecture(**changes: Any) -> Architecture:
    """A made-up architecture; nothing needs a model for it."""
    sizes: dict[str, Any] = {
        "family": "llama",
        "hidden": 32,
        "layers": 2,
        "heads": 8,
        "kv_heads": 4,
        "head_dim": 4,
        "channels": 24,
        "vocab": 64,
        "tied": False,
        "linears": SPECS,
    }
    return Architecture(**{**sizes, **changes})


def model_architecture(model: Any) -> Architecture:
    return architecture_of(model.config.to_dict(), list(model.state_dict()))


def with_lora(
    model: nn.Module, arch: Architecture, *, seed: int = 0, scale: float = 0.1, alpha: int = 12
) -> Any:
    """Rank-4 LoRA without dropout on every decoder linear, A and B random (``scale`` 0: B stays zero)."""
    names = [arch.module_name(layer, spec) for layer in range(arch.layers) for spec in arch.linears]
    config = LoraConfig(
        r=4,
        lora_alpha=alpha,
        lora_dropout=0.0,
        target_modules=names,
        fan_in_fan_out=arch.linears[0].transposed,
    )
    peft_model = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_" in name:
                size = scale if "lora_B" in name else 0.2
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * size)
    return peft_model


def backward(model: Any, *, seed: int, vocab: int = 128) -> None:
    """Gradients of the language-model loss on random tokens, replacing the present ones."""
    ids = torch.randint(0, vocab, (2, 12), generator=torch.Generator().manual_seed(seed))
    model.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()


def delta_of(peft_model: Any, arch: Architecture, layer: int, spec: LinearSpec) -> torch.Tensor:
    module: Any = decoder_linear(peft_model, arch, layer, spec)
    product: torch.Tensor = module.lora_B["default"].weight @ module.lora_A["default"].weight
    scaling: float = module.scaling["default"]
    return product.detach() * scaling


def random_layers(
    arch: Architecture, kv_heads: int, channels: int, seed: int = 0
) -> tuple[LayerStructure, ...]:
    """A uniform shape with other indices in every layer."""
    generator = torch.Generator().manual_seed(seed)

    def draw(size: int, count: int) -> torch.Tensor:
        return torch.randperm(size, generator=generator)[:count].sort().values.to(torch.int32)

    return tuple(
        LayerStructure(kv_groups=draw(arch.kv_heads, kv_heads), channels=draw(arch.channels, channels))
        for _ in range(arch.layers)
    )
