"""Tiny random models of every family, small enough to build in milliseconds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

VOCAB = 128
SPECIAL = ("<unk>", "<s>", "</s>", "<pad>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<s>{{ message['role'] }}: {{ message['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)

_BASE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 3,
}
_LAYER_TYPES = ["sliding_attention", "full_attention"]


def _config(name: str, **changes: Any) -> Callable[[], Any]:
    return lambda: getattr(transformers, name)(**{**_BASE, **changes})


def _gpt2() -> Any:
    return transformers.GPT2Config(
        vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=256, bos_token_id=1, eos_token_id=2
    )


TINY: dict[str, Callable[[], Any]] = {
    "llama_mha": _config("LlamaConfig", num_key_value_heads=4),
    "llama_gqa": _config("LlamaConfig", hidden_size=64, num_attention_heads=8, num_key_value_heads=4),
    "llama_mqa": _config("LlamaConfig", num_key_value_heads=1),
    "llama_head_dim": _config("LlamaConfig", num_key_value_heads=4, head_dim=16),
    "llama_tied": _config("LlamaConfig", tie_word_embeddings=True, num_hidden_layers=3),
    "mistral": _config("MistralConfig", sliding_window=None),
    "qwen2": _config("Qwen2Config"),
    "qwen3": _config("Qwen3Config", head_dim=16, tie_word_embeddings=True),
    "gemma2": _config(
        "Gemma2Config",
        head_dim=16,
        query_pre_attn_scalar=16,
        sliding_window=16,
        layer_types=_LAYER_TYPES,
        tie_word_embeddings=True,
    ),
    "gemma3_text": _config(
        "Gemma3TextConfig",
        head_dim=16,
        query_pre_attn_scalar=16,
        sliding_window=16,
        layer_types=_LAYER_TYPES,
        tie_word_embeddings=True,
    ),
    "phi3": _config("Phi3Config"),
    "gpt2": _gpt2,
    "mixtral": _config("MixtralConfig", num_local_experts=4, num_experts_per_tok=2, sliding_window=None),
}
"""Kind -> builder of its config. ``gpt2`` is no declared family, ``mixtral`` is a mixture of experts."""

DENSE = tuple(kind for kind in TINY if kind not in ("gpt2", "mixtral"))
"""The kinds whose architecture is declared."""


def tiny_model(kind: str, seed: int = 0) -> PreTrainedModel:
    """A float32 model of ``kind`` in eval mode, every weight, norm and bias random under ``seed``."""
    with torch.random.fork_rng():
        model = AutoModelForCausalLM.from_config(
            TINY[kind](),
            dtype=torch.float32,
        )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                parameter.copy_(noise * 0.15)
            else:  # a norm stays near its initial value (1, or 0 where the norm adds 1), a bias near 0
                is_bias = name.endswith("bias")
                parameter.copy_((torch.zeros_like(parameter) if is_bias else parameter) + 0.1 * noise)
    model.eval()
    return model


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte tokenizer of 128 ids: 4 special tokens, the ASCII bytes of text, and UTF-8 for "À" to "Ù"."""
    ascii_bytes = ["Ċ", "ĉ", "Ġ", *map(chr, range(33, 127))]  # byte-level spelling of newline, tab and space
    latin_bytes = ["Ã", *(chr(290 + i) for i in range(VOCAB - len(SPECIAL) - len(ascii_bytes) - 1))]
    vocab = {token: index for index, token in enumerate([*SPECIAL, *ascii_bytes, *latin_bytes])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def tiny_checkpoint(kind: str, path: Path, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> Path:
    """Save ``tiny_model(kind, seed)`` in ``dtype`` with a tokenizer as a Hugging Face folder; returns it."""
    tiny_model(kind, seed).to(dtype).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path
