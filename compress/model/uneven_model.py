"""Models whose layers differ in size: a transformers class with its layers' linears resized or taken out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.pytorch_utils import Conv1D

from compress.model.config import build_config
from compress.model.layout import Architecture, LinearSpec
from compress.model.uneven import CLASS_PREFIX, plain_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def uneven_class(config: Mapping[str, Any], arch: Architecture) -> type[PreTrainedModel]:
    """The model class of an uneven config.json, to be used like the family's own (``from_pretrained``).

    It is the family's causal language model, changed after it is built: layer by layer the linears get their
    sizes, and a branch that is gone is replaced by a module that returns zeros.

    Args:
        config: The content of config.json.
        arch: The architecture read from it.
    """
    base: type[PreTrainedModel] = MODEL_FOR_CAUSAL_LM_MAPPING[type(build_config(plain_config(config)))]

    def init(self: PreTrainedModel, config: Any, *args: Any, **kwargs: Any) -> None:
        base.__init__(self, config, *args, **kwargs)
        resize_layers(self, arch)

    name = CLASS_PREFIX + base.__name__
    # transformers reads in the class's module what it can do (setting the attention implementation)
    return type(name, (base,), {"__init__": init, "__module__": base.__module__, "__qualname__": name})


def resize_layers(model: nn.Module, arch: Architecture) -> None:
    """Give every decoder layer of ``model``, built with the base sizes, the sizes of ``arch``; new weights are random.

    Args:
        model: A causal language model of transformers.
        arch: Its architecture, with ``layer_shapes``.
    """
    for index in range(arch.layers):
        layer = model.get_submodule(arch.layer_prefix.format(layer=index).rstrip("."))
        here = arch.at(index)
        for spec in arch.linears_at(index):
            _resize(layer, spec, *here.linear_shape(spec))
        if arch.prunable_heads:
            place = arch.branch(attention=True)
            if here.kv_heads:
                _resize_heads(layer.get_submodule(place), here)
            else:
                layer.set_submodule(place, NoAttention(index))
        if not here.channels:
            layer.set_submodule(arch.branch(attention=False), NoMLP())


class NoAttention(nn.Module):
    """Stands for an attention that is gone: adds nothing to the hidden states.

    It still enters one zero per position into the KV cache, because the cache counts its positions in a layer that may
    be this one.
    """

    def __init__(self, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx

    def forward(
        self, hidden_states: Tensor, *_: Any, past_key_values: Any = None, **__: Any
    ) -> tuple[Tensor, None]:
        """Zeros like ``hidden_states`` [B, S, H], and no attention weights."""
        if past_key_values is not None:
            batch, length, _hidden = hidden_states.shape
            positions_B1S1 = hidden_states.new_zeros(batch, 1, length, 1)
            past_key_values.update(positions_B1S1, positions_B1S1, self.layer_idx)
        return torch.zeros_like(hidden_states), None


class NoMLP(nn.Module):
    """Stands for an MLP that is gone: adds nothing to the hidden states."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Zeros like ``hidden_states``."""
        return torch.zeros_like(hidden_states)


class _LayerConfig:
    """The model's config as one attention sees it: with its own head counts."""

    def __init__(self, config: Any, **own: int) -> None:
        self.__dict__ |= {**own, "shared_config": config}

    def __getattr__(self, name: str) -> Any:
        if name == "shared_config" or name.startswith("__"):  # a copy is being made, of this object
            raise AttributeError(name)
        return getattr(self.shared_config, name)


def _resize(layer: nn.Module, spec: LinearSpec, rows: int, columns: int) -> None:
    old: Any = layer.get_submodule(spec.name)
    weight, bias = old.weight, old.bias is not None
    if tuple(weight.shape) == ((columns, rows) if spec.transposed else (rows, columns)):
        return
    new = (
        Conv1D(rows, columns)
        if spec.transposed
        else nn.Linear(columns, rows, bias=bias, device=weight.device)
    )
    layer.set_submodule(spec.name, new.to(device=weight.device, dtype=weight.dtype))


def _resize_heads(attention: Any, here: Architecture) -> None:
    """Attention modules of transformers view rows as heads of head_dim; only what they keep of the config is set."""
    sizes = {
        "num_attention_heads": here.heads,
        "num_heads": here.heads,
        "num_key_value_heads": here.kv_heads,
        "num_key_value_groups": here.queries_per_group,
    }
    for name, size in sizes.items():
        if hasattr(attention, name):
            setattr(attention, name, size)
    if any(spec.role == "qkv" for spec in here.linears):  # these cut the fused rows by what the config says
        attention.config = _LayerConfig(
            attention.config, num_attention_heads=here.heads, num_key_value_heads=here.kv_heads
        )
