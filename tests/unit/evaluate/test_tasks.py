from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compress.errors import CompressError
from compress.evaluate.task_file import read_task
from compress.evaluate.tasks import joined, score_task, share_error
from tests.tiny import tiny_model, tiny_tokenizer

QUESTIONS = [
    {"query": "The river is", "choices": ["blue", "a very long answer", "é"], "gold": 0},
    {"query": "Is it so? ", "choices": ["yes", "no"], "gold": 1, "source": "other keys stay unread"},
    {"query": "Line\u2028with a separator", "choices": [" x", "yy"], "gold": 1},
    {"query": "Answer:\n", "choices": ["first", "second"], "gold": 0},
    {"query": "Once more", "choices": ["n", "nn", "nnn", "nnnn"], "gold": 3},
]


def _write(path: Path, rows: list[Any]) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def _log_likelihood(model: Any, prompt: str, whole: str) -> tuple[float, bool]:
    """By the tiny tokenizer of one byte a token, so no boundary can go wrong; a pass for every token, in float64."""
    tokenizer = tiny_tokenizer()
    ids = tokenizer(whole, add_special_tokens=False)["input_ids"]
    start = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
    model, total, greedy = model.double(), 0.0, True
    for at in range(start, len(ids)):
        with torch.no_grad():
            log_p = model(input_ids=torch.tensor([ids[:at]])).logits[0, -1].log_softmax(-1)
        total += float(log_p[ids[at]])
        greedy = greedy and int(log_p.argmax()) == ids[at]
    model.float()
    return total, greedy


@pytest.mark.parametrize("kind", ["llama_gqa", "gemma2"])
@pytest.mark.parametrize("batch_tokens", [32, 4096])
def test_choices_agree_with_an_unbatched_loop(kind: str, batch_tokens: int, tmp_path: Path) -> None:
    model = tiny_model(kind)
    task = read_task(_write(tmp_path / "mine.jsonl", QUESTIONS))
    plain, norm = [], []
    for row in QUESTIONS:
        scores, by_byte = [], []
        for choice in row["choices"]:
            query = row["query"]
            spaced = query if query[-1].isspace() or choice[0].isspace() else query + " "
            value, _ = _log_likelihood(model, spaced.rstrip(), spaced + choice)
            scores.append(value)
            by_byte.append(value / len(choice.encode()))
        plain.append(int(np.argmax(scores)) == row["gold"])
        norm.append(int(np.argmax(by_byte)) == row["gold"])
    found = score_task(model, tiny_tokenizer(), task, batch_tokens=batch_tokens)
    assert found.accuracy == np.mean(plain)
    assert found.accuracy_norm == np.mean(norm)
    assert found.accuracy_error == pytest.approx(np.std(plain, ddof=1) / math.sqrt(5))
    assert found.accuracy_norm_error == pytest.approx(np.std(norm, ddof=1) / math.sqrt(5))
    assert (found.kind, found.rows, found.perplexity, found.truncated) == ("choices", 5, None, 0)


def test_the_gold_of_every_kind_of_scoring_can_win(tmp_path: Path) -> None:
    """The loop above would pass with accuracies of zero; here gold is what the model prefers."""
    model, rows = tiny_model("llama_gqa"), []
    for row in QUESTIONS:
        query = (
            row["query"]
            if row["query"][-1].isspace() or row["choices"][0][0].isspace()
            else row["query"] + " "
        )
        values = [
            _log_likelihood(model, query.rstrip(), (query if not c[0].isspace() else row["query"]) + c)[0]
            for c in row["choices"]
        ]
        rows.append({**row, "gold": int(np.argmax(values))})
    found = score_task(model, tiny_tokenizer(), read_task(_write(tmp_path / "t.jsonl", rows)))
    assert (found.accuracy, found.accuracy_error) == (1.0, 0.0)
    assert found.accuracy_norm is not None
    assert found.accuracy_norm < 1  # the long answer and the four letters lose less by the byte


def test_continuations_agree_with_an_unbatched_loop(tmp_path: Path) -> None:
    model, tokenizer = tiny_model("llama_gqa"), tiny_tokenizer()
    contexts = ["It was late in the", "She took the", "He said", "Nobody knew the"]
    rows = [
        {"context": c, "continuation": w} for c, w in zip(contexts, ["day", "hat", "so", "way"], strict=True)
    ]
    ids = tokenizer("A line that the model goes on with", add_special_tokens=False)["input_ids"]
    for _ in range(200):  # a continuation that greedy decoding writes and that is text of our vocabulary
        with torch.no_grad():
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        text = tokenizer.decode(ids)
        if tokenizer(text, add_special_tokens=False)["input_ids"] == ids and text.isascii() and ids[-1] > 6:
            break
        ids = [*ids[:-2], 40 + len(ids) % 50]
    rows.append({"context": tokenizer.decode(ids[:-1]), "continuation": tokenizer.decode(ids[-1:])})
    expected = [
        _log_likelihood(model, row["context"], row["context"] + " " + row["continuation"]) for row in rows[:4]
    ]
    expected.append(_log_likelihood(model, rows[4]["context"], rows[4]["context"] + rows[4]["continuation"]))
    task = read_task(_write(tmp_path / "lambada.jsonl", rows[:4]))
    found = score_task(model, tokenizer, task)
    assert found.perplexity == pytest.approx(math.exp(-np.mean([e[0] for e in expected[:4]])), rel=1e-5)
    assert found.accuracy == np.mean([e[1] for e in expected[:4]])
    assert (found.kind, found.accuracy_norm, found.accuracy_norm_error) == ("continuation", None, None)
    last = read_task(_write(tmp_path / "last.jsonl", rows[4:]))
    greedy = score_task(model, tokenizer, last, delimiter="")
    assert expected[4][1]
    assert (greedy.accuracy, greedy.accuracy_error) == (1.0, None)


def test_the_protocol_says_what_was_scored(tmp_path: Path) -> None:
    path = _write(tmp_path / "quiz.jsonl", QUESTIONS)
    task = read_task(path, rows=2)
    assert (len(task.rows), task.file_rows) == (2, 5)
    sha = hashlib.sha256(path.read_bytes()).hexdigest()
    assert task.sha256 == sha
    found = score_task(tiny_model("llama_mha"), tiny_tokenizer(), task, delimiter="\nAnswer: ")
    assert found.protocol_line == (
        f'quiz, sha256 {sha[:12]}, 2 of 5 rows, delimiter "\\nAnswer: ", no examples, no BOS, float32 on cpu'
    )
    begun = score_task(tiny_model("llama_mha"), tiny_tokenizer(), task, bos=True)
    assert begun.protocol_line.endswith("no examples, BOS, float32 on cpu")
    assert begun.accuracy_norm != found.accuracy_norm or begun != found
    assert found.to_dict()["accuracy"] == found.accuracy


@given(st.lists(st.booleans(), min_size=2, max_size=50))
def test_error_of_a_share(right: list[bool]) -> None:
    assert share_error(right) == pytest.approx(
        float(np.std(right, ddof=1)) / math.sqrt(len(right)), abs=1e-12
    )


def test_the_delimiter_is_left_out_where_there_is_white_space() -> None:
    assert joined("a", "b", " ") == "a "
    assert joined("a\n", "b", " ") == "a\n"
    assert joined("a", " b", " ") == "a"
    assert joined("", "b", " ") == ""


BAD: list[tuple[list[Any], str, str]] = [
    ([QUESTIONS[0], "{oops"], "bad.jsonl, line 2, is no valid JSON", "Mend that line"),
    ([QUESTIONS[0], "", "[1]"], "bad.jsonl, line 3, is no JSON object", "query"),
    ([{"query": "q", "choices": ["a", "b"], "gold": 2}], "line 1, has the gold 2, and 2 choices", "0 to 1"),
    ([{"query": "q", "choices": ["a", "b"], "gold": True}], "has the gold True", "0 to 1"),
    ([{"query": "q", "choices": ["a", "b"]}], "has the gold None", "0 to 1"),
    ([{"query": "q", "choices": ["a"], "gold": 0}], "has 1 choices", "at least two"),
    ([{"query": "q", "choices": ["a", " "], "gold": 0}], "no list of texts as 'choices'", "query"),
    ([{"query": "q", "choices": "ab", "gold": 0}], "no list of texts as 'choices'", "query"),
    ([{"query": 3, "choices": ["a", "b"], "gold": 0}], "has no text 'query'", "query"),
    ([{"context": "c"}], "has no text 'continuation'", "continuation"),
    ([{"context": "c", "continuation": " "}], "has an empty 'continuation'", "some text"),
    ([{"question": "c"}], "has no text 'context'", "context"),
    ([QUESTIONS[0], {"context": "c", "continuation": "d"}], "line 2, is a row of another kind", "one kind"),
    (["", ""], "has no row", "query"),
]


@pytest.mark.parametrize(("rows", "cause", "remedy"), BAD, ids=[case[1] for case in BAD])
def test_bad_rows_are_named_with_file_and_line(
    rows: list[Any], cause: str, remedy: str, tmp_path: Path
) -> None:
    path = _write(tmp_path / "bad.jsonl", rows)
    with pytest.raises(CompressError) as caught:
        read_task(path, rows=1)
    assert cause in caught.value.cause
    assert remedy in caught.value.remedy


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(CompressError, match="no task file"):
        read_task(tmp_path / "absent.jsonl")
    (tmp_path / "latin.jsonl").write_bytes(b'{"query": "\xe9"}')
    with pytest.raises(CompressError, match="not a text file in UTF-8"):
        read_task(tmp_path / "latin.jsonl")


def test_a_row_that_cannot_be_scored_is_named(tmp_path: Path) -> None:
    rows = [{"context": "c", "continuation": "d"}, {"context": "c", "continuation": "x" * 400}]
    task = read_task(_write(tmp_path / "long.jsonl", rows))
    with pytest.raises(CompressError, match=r"Task long, line 2: a continuation of 401 tokens is longer"):
        score_task(tiny_model("llama_mha"), tiny_tokenizer(), task)


def test_contexts_that_lost_their_start_are_counted(tmp_path: Path) -> None:
    rows = [{"query": "q" * 300, "choices": ["a", "b"], "gold": 0}, QUESTIONS[0]]
    found = score_task(
        tiny_model("llama_mha"), tiny_tokenizer(), read_task(_write(tmp_path / "t.jsonl", rows))
    )
    assert found.truncated == 2
