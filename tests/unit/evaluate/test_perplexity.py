from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from compress.data.text import Message, chat_text, plain_text
from compress.data.windows import Windows, token_windows
from compress.errors import CompressError
from compress.evaluate import perplexity as perplexity_module
from compress.evaluate.perplexity import mean_loss, perplexity, window_losses, windows_at_once
from tests.tiny import tiny_model, tiny_tokenizer


def _windows(count: int, length: int, *, mask: float = 0.0) -> Windows:
    generator = torch.Generator().manual_seed(count * 100 + length)
    ids = torch.randint(4, 128, (count, length), generator=generator)
    labels = ids.masked_fill(torch.rand(ids.shape, generator=generator) < mask, -100)
    return Windows(ids=ids, labels=labels, protocol={"source": "noise", "split": "test", "windows": count})


def _reference(model: Any, windows: Windows) -> tuple[float, int, float]:
    """Mean loss, tokens and standard error in float64, one token at a time."""
    model = model.double()
    sums, counts = [], []
    for ids, labels in zip(windows.ids, windows.labels, strict=True):
        with torch.no_grad():
            logits = model(input_ids=ids[None]).logits[0]
        total, scored = 0.0, 0
        for position in range(1, len(ids)):
            if labels[position] != -100:
                row = logits[position - 1].tolist()
                top = max(row)
                log_sum = top + math.log(sum(math.exp(value - top) for value in row))
                total += log_sum - row[int(ids[position])]
                scored += 1
        sums.append(total)
        counts.append(scored)
    mean = sum(sums) / sum(counts)
    n = len(sums)
    spread = sum((s - mean * c) ** 2 for s, c in zip(sums, counts, strict=True)) * n / max(n - 1, 1)
    model.float()
    return mean, sum(counts), math.sqrt(spread) / sum(counts)


@pytest.mark.parametrize("kind", ["llama_gqa", "gemma2", "qwen3"])
@pytest.mark.parametrize("mask", [0.0, 0.6])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_agrees_with_the_float64_reference(
    kind: str, mask: float, batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(perplexity_module, "CHUNK_ELEMENTS", 128 * 5)  # several chunks a window
    model, windows = tiny_model(kind), _windows(5, 24, mask=mask)
    mean, tokens, error = _reference(model, windows)
    result = perplexity(model, windows, batch_size=batch_size, model_name="tiny")
    assert result.mean_nll == pytest.approx(mean, rel=1e-5)
    assert result.value == pytest.approx(math.exp(mean), rel=1e-4)
    assert result.tokens == tokens
    assert result.standard_error == pytest.approx(error, rel=1e-3)
    assert mean_loss(model, windows, batch_size=batch_size) == pytest.approx(mean, rel=1e-5)
    assert result.protocol == {
        **windows.protocol,
        "model": "tiny",
        "tokens_scored": tokens,
        "dtype": "float32",
        "device": "cpu",
    }


def test_standard_error_of_equal_windows_is_the_textbook_one() -> None:
    model, windows = tiny_model("llama_mha"), _windows(6, 12)
    sums, counts = window_losses(model, windows)
    result = perplexity(model, windows)
    assert result.standard_error == pytest.approx(float((sums / counts).std()) / math.sqrt(6))
    single = Windows(ids=windows.ids[:1], labels=windows.labels[:1], protocol={})
    assert perplexity(model, single).standard_error is None


def test_agrees_with_the_model_s_own_loss_on_text_and_answers() -> None:
    model, tokenizer = tiny_model("llama_tied"), tiny_tokenizer()
    talks = [
        (Message(role="user", content="q" * n), Message(role="assistant", content="answer" * n))
        for n in (1, 2, 3)
    ]
    for windows in (
        token_windows(
            plain_text("t", "test", ["some text to be scored " * 9]), tokenizer, length=32, bos=True
        ),
        token_windows(chat_text("c", "test", talks), tokenizer, length=100),
    ):
        with torch.no_grad():
            expected = float(model(input_ids=windows.ids, labels=windows.labels).loss)
        assert mean_loss(model, windows, batch_size=2) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("room", "at_once"), [(1, 1), (2, 2), (3, 3), (100, 4)])
def test_windows_are_scored_together_as_their_logits_allow(
    room: int, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, windows = tiny_model("llama_gqa"), _windows(9, 40)
    vocabulary = model.config.vocab_size
    monkeypatch.setattr("compress.evaluate.perplexity.LOGITS_AT_ONCE", room * 40 * vocabulary)
    together: list[int] = []
    handle = model.model.embed_tokens.register_forward_pre_hook(
        lambda _, args: together.append(args[0].shape[0])
    )
    sums, counts = window_losses(model, windows)
    handle.remove()
    assert max(together) == at_once
    assert sum(together) == 9
    one_by_one, same_counts = window_losses(model, windows, batch_size=1)
    torch.testing.assert_close(sums, one_by_one, rtol=1e-5, atol=0)
    assert torch.equal(counts, same_counts)
    assert windows_at_once(10 * vocabulary * room, 40) == 1  # one window, whatever it takes


def test_columns_after_the_last_label_are_not_computed() -> None:
    model, windows = tiny_model("llama_gqa"), _windows(3, 40)
    windows.labels[:, 10:] = -100
    windows.labels[2] = -100
    widths: list[int] = []
    handle = model.model.embed_tokens.register_forward_pre_hook(
        lambda _, args: widths.append(args[0].shape[1])
    )
    sums, counts = window_losses(model, windows, batch_size=1)
    handle.remove()
    assert widths == [10, 10]
    assert counts.tolist() == [9, 9, 0]
    assert sums[2] == 0


def test_mode_is_restored_and_dropout_is_off() -> None:
    model = tiny_model("llama_gqa")
    windows = _windows(2, 10)
    calm = mean_loss(model, windows)
    model.config.attention_dropout = 0.9
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.9
    model.train()
    calls: list[tuple[int, int, str]] = []
    assert mean_loss(
        model, windows, batch_size=1, progress=lambda *call: calls.append(call)
    ) == pytest.approx(calm)
    assert model.training
    assert calls == [(1, 2, "scoring"), (2, 2, "scoring")]


def test_bfloat16_is_recorded_and_close() -> None:
    model, windows = tiny_model("llama_gqa"), _windows(4, 24)
    exact = mean_loss(model, windows)
    result = perplexity(model.bfloat16(), windows)
    assert result.protocol["dtype"] == "bfloat16"
    assert result.mean_nll == pytest.approx(exact, rel=0.02)
    assert result.to_dict()["protocol"]["tokens_scored"] == 4 * 23


def test_bad_input_is_one_sentence() -> None:
    model, windows = tiny_model("llama_gqa"), _windows(2, 8)
    silent = Windows(ids=windows.ids, labels=torch.full_like(windows.labels, -100), protocol={})
    with pytest.raises(CompressError, match="no token to score"):
        mean_loss(model, silent)
    foreign = Windows(ids=windows.ids + 100, labels=windows.labels + 100, protocol={})
    with pytest.raises(CompressError, match="outside the model's vocabulary of 128"):
        mean_loss(model, foreign)
    with torch.no_grad():
        model.lm_head.weight[5] = float("nan")
    with pytest.raises(CompressError, match="not finite in window 0"):
        perplexity(model, windows)
