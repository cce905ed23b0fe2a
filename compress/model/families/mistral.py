"""Mistral: the Llama layout without biases."""

from __future__ import annotations

from compress.model.family import FAMILIES, Family, separate_linears

FAMILY = FAMILIES.register("mistral")(Family(model_type="mistral", linears=separate_linears()))
