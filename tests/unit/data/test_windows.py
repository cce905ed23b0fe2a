from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.data import windows as windows_module
from compress.data.text import Conversation, Message, Text, chat_text, plain_text
from compress.data.windows import Draw, Windows, token_windows
from compress.errors import CompressError, UsageError
from tests.tiny import tiny_tokenizer

TOKENIZER = tiny_tokenizer()


def _ids(text: str) -> list[int]:
    return list(TOKENIZER(text, add_special_tokens=False)["input_ids"])


def _talk(*turns: str) -> Conversation:
    roles = ("user", "assistant")
    return tuple(Message(role=roles[i % 2], content=turn) for i, turn in enumerate(turns))


def test_evaluation_windows_are_the_text_from_its_start() -> None:
    text = plain_text("t", "test", ["Hello there,", "this is a text of some length."])
    expected = _ids("Hello there,\n\nthis is a text of some length.")
    windows = token_windows(text, TOKENIZER, length=8)
    assert windows.ids.flatten().tolist() == expected[: len(expected) // 8 * 8]
    assert windows.labels[:, 1:].equal(windows.ids[:, 1:])
    assert bool((windows.labels[:, 0] == -100).all())
    assert windows.protocol == {
        "source": "t",
        "split": "test",
        "sha256": text.sha256,
        "join": "\n\n",
        "bos": False,
        "length": 8,
        "stride": 8,
        "layout": "text",
        "windows": len(windows),
        "requested_windows": None,
        "tokens": 7 * len(windows),
        "text_tokens": len(expected),
        "seed": None,
    }


def test_bos_begins_every_window_and_loses_no_text() -> None:
    text = plain_text("t", "test", ["abcdefghijklmnopqrstuvwxyz"])
    windows = token_windows(text, TOKENIZER, length=5, bos=True, count=3)
    assert windows.ids[:, 0].tolist() == [TOKENIZER.bos_token_id] * 3
    assert windows.ids[:, 1:].flatten().tolist() == _ids("abcdefghijkl")
    assert windows.protocol["stride"] == 4
    assert windows.protocol["tokens"] == 12


@given(st.integers(2, 9), st.integers(1, 40), st.integers(0, 5), st.integers(0, 1))
@settings(max_examples=30, deadline=None)
def test_drawn_windows_are_distinct_and_from_the_text(length: int, count: int, seed: int, bos: int) -> None:
    body = "".join(chr(33 + (i * i + i // 7) % 90) for i in range(150))
    text = plain_text("t", "train", [body])
    drawn = token_windows(text, TOKENIZER, length=length, count=count, seed=seed, bos=bool(bos))
    every = token_windows(text, TOKENIZER, length=length, bos=bool(bos))
    assert len(drawn) == min(count, len(every))
    left = every.ids.tolist()
    for row in drawn.ids.tolist():
        left.remove(row)  # fails when a window is drawn more often than the text has it
    again = token_windows(text, TOKENIZER, length=length, count=count, seed=seed, bos=bool(bos))
    assert drawn.ids.equal(again.ids)


def test_another_seed_is_another_order() -> None:
    text = plain_text("t", "train", ["".join(chr(33 + i % 90) for i in range(2000))])
    first, second = (token_windows(text, TOKENIZER, length=10, seed=seed).ids for seed in (0, 1))
    assert not first.equal(second)
    assert sorted(first.tolist()) == sorted(second.tolist())


def distinct(lines: int) -> Text:
    """A text in which no two windows are alike."""
    rng = random.Random(0)
    return plain_text("t", "train", ["".join(rng.choices("abcdefgh", k=19)) for _ in range(lines)], "\n")


def reference_draw(text: Text, length: int, count: int, seed: int, segment: int) -> list[list[int]]:
    """Segments in drawn order until they hold enough windows, then a permutation of these."""
    joined, parts, start = text.joined, [], 0
    while start < len(joined):
        stop = joined.find("\n", min(start + segment, len(joined))) + 1 or len(joined)
        stop = len(joined) if len(joined) <= 4 * segment else stop
        parts.append(joined[start:stop])
        start = stop
    generator, pool = torch.Generator().manual_seed(seed), []
    for index in torch.randperm(len(parts), generator=generator).tolist():
        if len(pool) < count:
            ids = _ids(parts[index])
            pool += [ids[at : at + length] for at in range(0, len(ids) - length + 1, length)]
    return [pool[at] for at in torch.randperm(len(pool), generator=generator)[:count].tolist()]


@pytest.mark.parametrize("lines", [400, 4000], ids=["whole", "segments"])
@pytest.mark.parametrize("seed", [3, 4])
def test_a_draw_stays_the_same_from_version_to_version(
    lines: int, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(windows_module, "SEGMENT_CHARACTERS", 4096)
    text = distinct(lines)
    for count in (20, 300):
        found = token_windows(text, TOKENIZER, length=16, count=count, seed=seed)
        assert found.ids.tolist() == reference_draw(text, 16, count, seed, 4096)
        assert "shared_windows" not in found.protocol


@pytest.mark.parametrize("lines", [400, 4000], ids=["whole", "segments"])
def test_a_draw_apart_from_another_shares_no_window_with_it(
    lines: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(windows_module, "SEGMENT_CHARACTERS", 4096)
    text = distinct(lines)
    met = 0
    for seed in range(8):
        one = token_windows(text, TOKENIZER, length=16, count=200, seed=seed)
        plain = token_windows(text, TOKENIZER, length=16, count=100, seed=seed + 50)
        apart = Draw(seed=seed, count=200)
        two = token_windows(text, TOKENIZER, length=16, count=100, seed=seed + 50, apart=apart)
        assert (len(two), two.protocol["shared_windows"]) == (100, 0)
        taken = {tuple(row) for row in one.ids.tolist()}
        assert taken.isdisjoint(map(tuple, two.ids.tolist()))
        assert len({tuple(row) for row in two.ids.tolist()}) == 100
        if taken.isdisjoint(map(tuple, plain.ids.tolist())):
            assert two.ids.equal(plain.ids)
        else:
            met += 1
    assert met > 0, "the test must have to keep them apart"


def test_what_is_left_of_a_short_text_is_filled_up_and_counted() -> None:
    text = distinct(100)
    every = {tuple(row) for row in token_windows(text, TOKENIZER, length=16).ids.tolist()}
    one = token_windows(text, TOKENIZER, length=16, count=len(every) - 7, seed=0)
    apart = Draw(seed=0, count=len(one))
    two = token_windows(text, TOKENIZER, length=16, count=20, seed=1, apart=apart)
    rows = [tuple(row) for row in two.ids.tolist()]
    assert len(set(rows)) == len(rows) == 20
    assert set(rows[:7]) == every - {tuple(row) for row in one.ids.tolist()}
    assert two.protocol["shared_windows"] == 13
    whole = token_windows(text, TOKENIZER, length=16, count=20, seed=1, apart=Draw(seed=0, count=10**6))
    assert (len(whole), whole.protocol["shared_windows"]) == (20, 20)
    with pytest.raises(ValueError, match="seed and a count"):
        token_windows(text, TOKENIZER, length=16, apart=apart)


def test_conversations_apart_from_others() -> None:
    text = chat_text("c", "train", [_talk(f"q{i}", f"a{i}") for i in range(10, 50)])
    length = 2 * len(_ids("<s>user: q10</s>\n<s>assistant: a10</s>\n")) + 3

    def answers(windows: Windows) -> set[str]:
        return set(TOKENIZER.decode(windows.ids[windows.labels != -100]).replace("</s>", "").split())

    one = token_windows(text, TOKENIZER, length=length, count=8, seed=0)
    apart = Draw(seed=0, count=8)
    two = token_windows(text, TOKENIZER, length=length, count=12, seed=1, apart=apart)
    assert (len(one), len(two), two.protocol["shared_windows"]) == (8, 12, 0)
    assert (len(answers(one)), len(answers(two))) == (16, 24)
    assert answers(one).isdisjoint(answers(two))
    more = token_windows(text, TOKENIZER, length=length, count=14, seed=1, apart=apart)
    assert more.protocol["shared_windows"] == 2
    assert more.ids[:12].equal(two.ids)


def test_long_text_is_tokenised_only_as_far_as_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(windows_module, "SEGMENT_CHARACTERS", 4096)
    lines = [f"line {i} of a long text" for i in range(4000)]
    text = plain_text("t", "train", lines, "\n")
    seen: list[int] = []

    class Counting:
        def __getattr__(self, name: str) -> Any:
            return getattr(TOKENIZER, name)

        def __call__(self, part: str, **kwargs: Any) -> Any:
            seen.append(len(part))
            assert part.startswith("line ")  # segments end at line ends
            return TOKENIZER(part, **kwargs)

    drawn = token_windows(text, Counting(), length=16, count=300, seed=3)
    assert len(drawn) == 300
    assert drawn.protocol["text_tokens"] is None
    assert sum(seen) < 0.2 * len(text.joined)
    for row in drawn.ids[:50]:
        assert TOKENIZER.decode(row) in text.joined
    seen.clear()
    every = token_windows(text, Counting(), length=16, seed=3)
    assert sum(seen) == len(text.joined) == every.protocol["text_tokens"]
    assert len(every) > 0.99 * len(text.joined) / 16
    more = token_windows(text, TOKENIZER, length=16, count=10**6, seed=3)
    assert more.ids.equal(every.ids)
    assert more.protocol["requested_windows"] == 10**6


def test_conversations_alone_in_evaluation() -> None:
    text = chat_text("c", "test", [_talk("hi", "yes"), _talk("how", "so")])
    windows = token_windows(text, TOKENIZER, length=64)
    assert len(windows) == 2
    whole = _ids("<s>user: hi</s>\n<s>assistant: yes</s>\n")
    row = windows.ids[0].tolist()
    assert row[: len(whole)] == whole
    assert set(row[len(whole) :]) == {TOKENIZER.pad_token_id}
    scored = windows.ids[0][windows.labels[0] != -100]
    assert TOKENIZER.decode(scored) == "yes</s>\n"
    assert windows.protocol["layout"] == "padded"
    assert windows.protocol["tokens"] == len(_ids("yes</s>\nso</s>\n"))
    assert windows.protocol["join"] is None


def test_conversations_packed_for_training() -> None:
    text = chat_text("c", "train", [_talk(f"q{i}", f"a{i}") for i in range(10, 50)])
    one = len(_ids("<s>user: q10</s>\n<s>assistant: a10</s>\n"))
    windows = token_windows(text, TOKENIZER, length=3 * one + 5, seed=0)
    assert len(windows) == 40 // 3 + 1
    answers = TOKENIZER.decode(windows.ids[windows.labels != -100]).replace("</s>", "").split()
    assert sorted(answers) == [f"a{i}" for i in range(10, 50)]
    assert answers != sorted(answers)
    assert windows.protocol["layout"] == "packed"
    fewer = token_windows(text, TOKENIZER, length=3 * one + 5, seed=0, count=4)
    assert fewer.ids.equal(windows.ids[:4])


def test_long_conversation_loses_its_end_or_is_dropped() -> None:
    text = chat_text("c", "test", [_talk("q" * 100, "a"), _talk("q", "a" * 100)])
    windows = token_windows(text, TOKENIZER, length=40)
    assert len(windows) == 1
    assert TOKENIZER.decode(windows.ids[0][-8:]) == "a" * 8
    with pytest.raises(CompressError, match="within 10 tokens"):
        token_windows(text, TOKENIZER, length=10)


def test_errors() -> None:
    text = plain_text("notes.txt", "test", ["abc"])
    with pytest.raises(CompressError, match=r"notes\.txt has 3 tokens, fewer than one window of 4"):
        token_windows(text, TOKENIZER, length=4)
    with pytest.raises(CompressError, match="3 tokens"):
        token_windows(text, TOKENIZER, length=4, seed=0)
    with pytest.raises(UsageError, match="nothing to predict"):
        token_windows(text, TOKENIZER, length=1)
    with pytest.raises(UsageError, match="0 windows"):
        token_windows(text, TOKENIZER, length=2, count=0)
    with pytest.raises(CompressError, match="nothing to read"):
        plain_text("notes.txt", "test", [" ", "\n"])
    with pytest.raises(CompressError, match="nothing to read"):
        chat_text("notes.txt", "test", [])
    with pytest.raises(ValueError, match="labels"):
        Windows(ids=torch.zeros(2, 3), labels=torch.zeros(2, 2), protocol={})
    bare = tiny_tokenizer()
    bare.bos_token = None
    with pytest.raises(CompressError, match="no BOS"):
        token_windows(text, bare, length=2, bos=True)
