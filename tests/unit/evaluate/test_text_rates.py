from __future__ import annotations

import math

import pytest

from compress.data.extent import Extent, scored_extent, token_ends
from compress.data.text import plain_text
from compress.data.windows import token_windows
from compress.evaluate.perplexity import perplexity, window_losses
from compress.evaluate.text_rates import text_rates
from tests.tiny import tiny_model, tiny_tokenizer

TEXT = "The river carries stones.\n\nEvery stone was once a hill, and every hill a sea; so it is said. " * 3


def test_rates_are_the_summed_loss_over_words_and_bytes() -> None:
    model, tokenizer = tiny_model("llama_gqa"), tiny_tokenizer()
    text = plain_text("t", "test", [TEXT])
    windows = token_windows(text, tokenizer, length=50)
    ends = token_ends(text, tokenizer)
    assert ends is not None
    extent = scored_extent(text, windows, ends)
    # the tiny tokenizer has one byte a token: the first byte of every window is not scored
    assert extent.bytes == 49 * len(windows)
    sums, _ = window_losses(model, windows)
    nats = float(sums.sum())
    measured = perplexity(model, windows)
    found = text_rates(measured, extent)
    assert found is not None
    assert found.bits_per_byte == pytest.approx(nats / math.log(2) / extent.bytes)
    assert found.word_perplexity == pytest.approx(math.exp(nats / extent.words))
    # one byte a token: the token-level perplexity is 2 to the bits per byte
    assert 2**found.bits_per_byte == pytest.approx(measured.value)
    assert found.to_dict() == {
        "word_perplexity": found.word_perplexity,
        "bits_per_byte": found.bits_per_byte,
        "words": extent.words,
        "bytes": extent.bytes,
    }
    assert text_rates(measured, Extent(words=0, bytes=3, characters=4)) is None
