"""Phi-3: one linear for q, k and v, one for gate and up."""

from __future__ import annotations

from compress.model.family import FAMILIES, Family, Projection

FAMILY = FAMILIES.register("phi3")(
    Family(
        model_type="phi3",
        linears=(
            Projection(name="self_attn.qkv_proj", role="qkv"),
            Projection(name="self_attn.o_proj", role="o"),
            Projection(name="mlp.gate_up_proj", role="gate_up"),
            Projection(name="mlp.down_proj", role="down"),
        ),
    )
)
