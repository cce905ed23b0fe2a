"""Qwen2 and Qwen2.5: biases on q, k and v."""

from __future__ import annotations

from compress.model.family import FAMILIES, Family, separate_linears

FAMILY = FAMILIES.register("qwen2")(Family(model_type="qwen2", linears=separate_linears(qkv_bias=True)))
