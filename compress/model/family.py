"""What a family file declares: the linears of a decoder layer, and how its config names things."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from compress.registry import Registry

Role = Literal["q", "k", "v", "o", "gate", "up", "down", "qkv", "gate_up"]
"""What a linear does; the rows of the fused ones are [q; k; v] and [gate; up] stacked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Projection:
    """One linear of a decoder layer.

    Args:
        name: Module name relative to the layer, "self_attn.q_proj".
        role: What it does.
        bias: True, False, or the config key that decides.
    """

    name: str
    role: Role
    bias: bool | str = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Fallback:
    """An equal architecture under another model type, for shapes that the family's own validator refuses.

    Args:
        model_type: The other model type.
        architecture: Its causal language model class, for ``architectures`` in config.json.
        changes: Config entries to write.
        drop: Config entries that the other class does not know.
        only_without: Config keys that must be false, else the two are not equal.
    """

    model_type: str
    architecture: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    drop: tuple[str, ...] = ()
    only_without: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """A declared family of dense decoders.

    Args:
        model_type: ``model_type`` in config.json.
        linears: Every prunable linear of one decoder layer.
        fallback: See `Fallback`.
    """

    model_type: str
    linears: tuple[Projection, ...]
    fallback: Fallback | None = None


FAMILIES: Registry[Family] = Registry("model family", "compress.model.families")


def family_of(model_type: str) -> Family | None:
    """The declared family of a ``model_type``, or None."""
    name = model_type.replace("_", "-")
    return FAMILIES.get(name) if name in FAMILIES.names() else None


def separate_linears(
    *, qkv_bias: bool | str = False, o_bias: bool | str = False, mlp_bias: bool | str = False
) -> tuple[Projection, ...]:
    """The seven linears of the Llama layout, with their biases."""
    return (
        Projection(name="self_attn.q_proj", role="q", bias=qkv_bias),
        Projection(name="self_attn.k_proj", role="k", bias=qkv_bias),
        Projection(name="self_attn.v_proj", role="v", bias=qkv_bias),
        Projection(name="self_attn.o_proj", role="o", bias=o_bias),
        Projection(name="mlp.gate_proj", role="gate", bias=mlp_bias),
        Projection(name="mlp.up_proj", role="up", bias=mlp_bias),
        Projection(name="mlp.down_proj", role="down", bias=mlp_bias),
    )
