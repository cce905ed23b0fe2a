"""Qwen3: explicit head_dim, and q/k norms per head_dim that pruning leaves alone."""

from __future__ import annotations

from compress.model.family import FAMILIES, Family, separate_linears

FAMILY = FAMILIES.register("qwen3")(
    Family(model_type="qwen3", linears=separate_linears(qkv_bias="attention_bias", o_bias="attention_bias"))
)
