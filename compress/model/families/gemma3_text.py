"""Gemma 3 (text): as Gemma 2, with q/k norms."""

from __future__ import annotations

from compress.model.family import FAMILIES, Family, separate_linears

FAMILY = FAMILIES.register("gemma3-text")(
    Family(
        model_type="gemma3_text", linears=separate_linears(qkv_bias="attention_bias", o_bias="attention_bias")
    )
)
