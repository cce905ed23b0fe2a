"""Activations of decoder layers computed again in the backward pass, instead of kept ("gradient checkpointing")."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from compress.errors import UsageError
from compress.model.config import build_config
from compress.model.resident import unit_of
from compress.model.uneven import plain_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PROBE = 8
"""Tokens on which a model in evaluation mode has to compute the same."""


def require_recompute(config: Mapping[str, Any]) -> None:
    """Refuse a model whose layers cannot be run again, by its config.json alone.

    Raises:
        UsageError: transformers says that the architecture does not support gradient checkpointing.
    """
    if not can_recompute(config):
        raise _unsupported(_kind(config).__name__)


def can_recompute(config: Mapping[str, Any]) -> bool:
    """Whether transformers says that the architecture of a config.json supports gradient checkpointing."""
    return bool(_kind(config).supports_gradient_checkpointing)


def _kind(config: Mapping[str, Any]) -> Any:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING  # imports the model's code

    return MODEL_FOR_CAUSAL_LM_MAPPING[type(build_config(plain_config(config)))]


@contextmanager
def recomputing(model: nn.Module, *, required: bool = True) -> Iterator[None]:
    """Keep only the inputs of decoder layers for backward passes in the block, which run each layer again.

    Results are the same bit by bit, dropout included. Forward and backward pass both belong into the block; whatever
    else a layer finds around it in the forward pass (settings of PEFT, hooks) it has to find in the backward pass too.
    Nothing of it is left behind the block.

    A model in evaluation mode stays in it, but for the flag of its layers, without which transformers would not run
    them again. Of a model that is read layer by layer (`compress.model.streamed`) nothing changes: it does so anyway.

    Args:
        model: A causal language model of transformers, plain or PEFT.
        required: Refuse a model that cannot do so; else its activations are kept.

    Raises:
        UsageError: It is required, and the architecture does not support it, or the model is in evaluation mode and
            its layers drop activations out by that flag of theirs.
    """
    network: Any = model
    network = network.get_base_model() if hasattr(model, "get_base_model") else network
    layers: list[nn.Module] = [m for m in network.modules() if isinstance(m, GradientCheckpointingLayer)]
    able = bool(layers) and network.supports_gradient_checkpointing
    if required and not able:
        raise _unsupported(type(network).__name__)
    if not able or any(unit_of(layer) is not None for layer in layers):
        yield
        return
    resting = [layer for layer in layers if not layer.training]
    expected = _probed(network) if resting else None
    _switch(network, on=True)
    try:
        for layer in resting:
            layer.training = True  # its own flag: what is in it drops nothing out
        same = expected is None or torch.equal(_probed(network), expected)
        if required and not same:
            raise UsageError(
                f"Layers of {type(network).__name__} drop activations out where they are run again, so scores would "
                "change.",
                "Leave out --recompute, or set the dropout of its config.json to 0.",
            )
        if not same:
            _rest(network, resting)
        yield
    finally:
        _rest(network, resting)


def _rest(network: PreTrainedModel, resting: list[nn.Module]) -> None:
    """Leave nothing of it behind."""
    for layer in resting:
        layer.training = False
    _switch(network, on=False)


@torch.no_grad()
def _probed(network: Any) -> torch.Tensor:
    """Logits of a few tokens."""
    ids_BS = torch.arange(_PROBE, device=network.device)[None] % network.config.vocab_size
    logits: torch.Tensor = network(input_ids=ids_BS, use_cache=False).logits
    return logits


def _switch(network: PreTrainedModel, *, on: bool) -> None:
    """Turn transformers' own gradient checkpointing on or off."""
    # transformers 5.17 has it under its older name, which later versions deprecate
    name = next(
        word for word in ("activation", "gradient") if hasattr(network, f"{word}_checkpointing_enable")
    )
    if not on:
        getattr(network, f"{name}_checkpointing_disable")()
        return
    getattr(network, f"{name}_checkpointing_enable")({"use_reentrant": False})
    # It lets embeddings ask for gradients, which only the other, reentrant way needs.
    network.disable_input_require_grads()


def _unsupported(name: str) -> UsageError:
    return UsageError(
        f"{name} of transformers does not support gradient checkpointing, which --recompute turns on.",
        "Leave out --recompute, and give --micro-batch 1 or a shorter --sequence where memory is short.",
    )
