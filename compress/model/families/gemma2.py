"""Gemma 2: explicit head_dim, alternating sliding and full attention of equal shapes."""

from __future__ import annotations

from compress.model.family import FAMILIES, Family, separate_linears

FAMILY = FAMILIES.register("gemma2")(
    Family(model_type="gemma2", linears=separate_linears(qkv_bias="attention_bias", o_bias="attention_bias"))
)
