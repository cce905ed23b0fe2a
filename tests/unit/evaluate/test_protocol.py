from __future__ import annotations

import torch

from compress.data.text import Message, chat_text, plain_text
from compress.data.windows import token_windows
from compress.evaluate.latency import throughput
from compress.evaluate.perplexity import perplexity
from compress.evaluate.protocol import protocol_line, speed_line
from tests.tiny import tiny_model, tiny_tokenizer


def test_line_says_how_a_perplexity_was_measured() -> None:
    text = plain_text("notes.txt", "test", ["some words"] * 20)
    windows = token_windows(text, tiny_tokenizer(), length=16, count=4)
    line = protocol_line(perplexity(tiny_model("llama_gqa"), windows, model_name="tiny").protocol)
    assert line == (
        f'tiny, notes.txt test, sha256 {text.sha256[:12]}, join "\\n\\n", no BOS, length 16, stride 16, '
        "4 windows, 60 tokens scored, float32 on cpu"
    )


def test_line_of_training_windows() -> None:
    talk = (Message(role="user", content="a"), Message(role="assistant", content="b"))
    windows = token_windows(chat_text("chat", "train", [talk] * 3), tiny_tokenizer(), length=64, seed=7)
    line = protocol_line(windows.protocol)
    assert "BOS by template" in line
    assert "packed conversations" in line
    assert line.endswith(f"{windows.protocol['tokens']} tokens, seed 7")
    assert "\n" not in line
    assert protocol_line({}) == ""


def test_a_text_that_was_held_to_an_extent_says_so() -> None:
    line = protocol_line({"length": 16, "stride": 16, "windows": 3, "tokens_scored": 40, "characters": 700})
    assert line == "length 16, stride 16, the first 700 characters, 3 windows, 40 tokens scored"


def test_line_of_a_speed() -> None:
    found = throughput(tiny_model("llama_gqa"), torch.arange(12)[None], decode_tokens=3, repeats=1)
    threads = torch.get_num_threads()
    assert speed_line(found.to_dict()) == (
        f"batch 1, 12 prompt tokens, 3 decoded, median of 1 runs, {threads} threads, float32 on cpu"
    )
    assert speed_line(found.to_dict() | {"device": "cuda"}).endswith("median of 1 runs, float32 on cuda")
