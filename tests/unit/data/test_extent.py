from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from compress.data.extent import limit_extent, scored_extent, token_ends
from compress.data.text import Message, chat_text, plain_text
from compress.data.windows import token_windows
from compress.errors import CompressError
from tests.tiny import tiny_tokenizer

TEXTS = st.text(st.sampled_from("ab  \n.À"), min_size=12, max_size=80)


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Pieces of words with the space in front, as a byte-level BPE has them; what it does not know is bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate(["<unk>", *alphabet])}
    merges = [("a", "b"), ("Ġ", "a"), ("Ġ", "b"), ("Ġ", "ab"), ("Ċ", "Ċ")]
    for left, right in merges:
        vocab.setdefault(left + right, len(vocab))
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


def ends_by_bytes(joined: str, tokens: list[str]) -> list[int]:
    """Where each token ends in characters, counted in the bytes that its letters stand for."""
    boundaries = []  # the character that every byte belongs to
    for index, character in enumerate(joined):
        boundaries += [index + 1] * len(character.encode())
    ends, at = [], 0
    for token in tokens:
        at += len(token)  # one letter of the byte-level alphabet is one byte
        ends.append(boundaries[at - 1])
    return ends


@pytest.mark.parametrize("make", [tiny_tokenizer, word_tokenizer])
def test_words_and_bytes_against_a_count_by_hand(make: Any) -> None:
    tokenizer = make()

    @given(TEXTS, st.integers(2, 7))
    def check(joined: str, length: int) -> None:
        try:
            text = plain_text("t", "test", [joined])
            windows = token_windows(text, tokenizer, length=length)
        except CompressError:  # nothing but white space, or too short
            return
        ends = token_ends(text, tokenizer)
        assert ends is not None
        tokens = tokenizer.convert_ids_to_tokens(tokenizer(joined, add_special_tokens=False)["input_ids"])
        expected = ends_by_bytes(joined, tokens)
        scored = set()
        for w in range(len(windows)):
            scored |= set(range(expected[w * length], expected[w * length + length - 1]))
        words = [
            i
            for i, c in enumerate(joined)
            if not c.isspace() and (i + 1 == len(joined) or joined[i + 1].isspace())
        ]
        extent = scored_extent(text, windows, ends)
        assert extent.words == sum(i in scored for i in words)
        assert extent.bytes == sum(len(joined[i].encode()) for i in scored)
        assert extent.characters == expected[len(windows) * length - 1]

    check()


@given(TEXTS.filter(str.strip), st.integers(2, 5), st.integers(1, 80))
def test_a_limit_keeps_the_tokens_that_end_within_it(joined: str, length: int, characters: int) -> None:
    tokenizer = tiny_tokenizer()
    text = plain_text("t", "test", [joined])
    windows = token_windows(text, tokenizer, length=length)
    ends = token_ends(text, tokenizer)
    assert ends is not None
    limited = limit_extent(windows, ends, characters)
    expected = [
        (w, t)
        for w in range(len(windows))
        for t in range(1, length)
        if int(ends[w * length + t]) <= characters
    ]
    found = [(w, t) for w, t in (limited.labels != -100).nonzero().tolist() if t > 0]
    assert found == expected
    assert limited.protocol["tokens"] == len(expected)
    assert limited.protocol["windows"] == len(limited) == len({w for w, _ in expected})
    assert torch.equal(limited.ids, windows.ids[: len(limited)])
    if len(limited):
        extent = scored_extent(text, limited, ends)
        assert extent.bytes <= len(joined[:characters].encode())


@pytest.mark.parametrize("make", [tiny_tokenizer, word_tokenizer])
def test_after_a_bos_every_token_of_the_text_counts(make: Any) -> None:
    tokenizer = make()
    tokenizer.bos_token = "<unk>"

    @given(TEXTS, st.integers(2, 7), st.integers(1, 80))
    def check(joined: str, length: int, characters: int) -> None:
        try:
            text = plain_text("t", "test", [joined])
            windows = token_windows(text, tokenizer, length=length, bos=True)
        except CompressError:
            return
        ends = token_ends(text, tokenizer)
        assert ends is not None
        tokens = tokenizer.convert_ids_to_tokens(tokenizer(joined, add_special_tokens=False)["input_ids"])
        expected = ends_by_bytes(joined, tokens)
        last = expected[len(windows) * (length - 1) - 1]  # without gaps: the text up to there
        extent = scored_extent(text, windows, ends)
        assert (extent.characters, extent.bytes) == (last, len(joined[:last].encode()))
        whole = [
            i
            for i, c in enumerate(joined)
            if not c.isspace() and (i + 1 == len(joined) or joined[i + 1].isspace())
        ]
        assert extent.words == sum(i < last for i in whole)
        limited = limit_extent(windows, ends, characters)
        inside = sum(end <= characters for end in expected[: len(windows) * (length - 1)])
        assert limited.protocol["tokens"] == int((limited.labels[:, 1:] != -100).sum()) == inside

    check()


def test_what_cannot_be_counted() -> None:
    chat = chat_text(
        "c", "test", [(Message(role="user", content="a"), Message(role="assistant", content="b"))]
    )
    assert token_ends(chat, tiny_tokenizer()) is None

    class Slow:
        is_fast = False

    assert token_ends(plain_text("t", "test", ["some text"]), Slow()) is None
