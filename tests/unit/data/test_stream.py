"""Conversations as one stream: everything that was said once, in order, and no padding."""

from __future__ import annotations

import pytest
import torch

from compress.data.chat import encode_conversation
from compress.data.stream import conversation_stream
from compress.data.text import Message, Text, chat_text
from compress.errors import CompressError
from tests.tiny import tiny_tokenizer


def conversations(count: int) -> Text:
    turns = [
        (
            Message(role="user", content=f"question {i} " * (1 + i % 5)),
            Message(role="assistant", content="yes"),
        )
        for i in range(count)
    ]
    return chat_text("talk", "train", turns)


def test_windows_are_the_conversations_one_after_another() -> None:
    text, tokenizer = conversations(40), tiny_tokenizer()
    windows = conversation_stream(text, tokenizer, length=16, count=10_000, seed=4)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(4)).tolist()
    expected = [token for i in order for token in encode_conversation(text.conversations[i], tokenizer)[0]]
    assert windows.ids.flatten().tolist() == expected[: len(expected) // 16 * 16]
    assert torch.equal(windows.labels[:, 1:], windows.ids[:, 1:])
    assert set(windows.labels[:, 0].tolist()) == {-100}
    protocol = windows.protocol
    assert (protocol["layout"], protocol["windows"], protocol["requested_windows"]) == (
        "stream",
        len(windows),
        10_000,
    )
    assert protocol["tokens"] == int((windows.labels[:, 1:] != -100).sum())


def test_no_more_windows_than_asked_for_and_other_seeds_read_others() -> None:
    text, tokenizer = conversations(40), tiny_tokenizer()
    found = [conversation_stream(text, tokenizer, length=16, count=3, seed=seed).ids for seed in (0, 0, 1)]
    assert found[0].shape == (3, 16)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


@pytest.mark.parametrize(("after", "count", "shared"), [(2, 3, 0), (6, 3, 0), (1000, 4, 4)])
def test_a_draw_after_another_reads_other_windows_while_there_are_some(
    after: int, count: int, shared: int
) -> None:
    text, tokenizer = conversations(40), tiny_tokenizer()
    first = conversation_stream(text, tokenizer, length=16, count=after, seed=4).ids.tolist()
    windows = conversation_stream(text, tokenizer, length=16, count=count, seed=4, after=after)
    assert windows.protocol["shared_windows"] == shared
    assert len(windows) == windows.protocol["windows"] == count
    assert sum(row in first for row in windows.ids.tolist()) == shared


def test_the_last_windows_of_a_stream_come_first() -> None:
    text, tokenizer = conversations(40), tiny_tokenizer()
    every = conversation_stream(text, tokenizer, length=16, count=10_000, seed=4).ids
    windows = conversation_stream(text, tokenizer, length=16, count=5, seed=4, after=len(every) - 2)
    assert torch.equal(windows.ids, torch.cat([every[-2:], every[:3]]))
    assert windows.protocol["shared_windows"] == 3


def test_less_than_a_window_is_refused() -> None:
    with pytest.raises(CompressError, match="fewer than one window of 4096"):
        conversation_stream(conversations(2), tiny_tokenizer(), length=4096, count=1, seed=0)
