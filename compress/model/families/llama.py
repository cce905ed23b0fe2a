"""Llama (and SmolLM, TinyLlama, Yi, ...): separate projections, optional biases."""

from __future__ import annotations

from compress.model.family import FAMILIES, Fallback, Family, separate_linears

FAMILY = FAMILIES.register("llama")(
    Family(
        model_type="llama",
        linears=separate_linears(qkv_bias="attention_bias", o_bias="attention_bias", mlp_bias="mlp_bias"),
        # LlamaConfig refuses head counts that do not divide the hidden size; MistralConfig takes them, and
        # without biases and sliding window both compute the same function.
        fallback=Fallback(
            model_type="mistral",
            architecture="MistralForCausalLM",
            changes={"sliding_window": None},
            drop=("attention_bias", "mlp_bias", "pretraining_tp"),
            only_without=("attention_bias", "mlp_bias"),
        ),
    )
)
