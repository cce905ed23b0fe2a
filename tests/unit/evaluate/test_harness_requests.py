from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compress.errors import CompressError, UsageError
from compress.evaluate import harness
from compress.evaluate.continuation import encode_pair, log_likelihoods
from compress.evaluate.harness import check_harness
from compress.evaluate.harness_requests import (
    Generation,
    generation_of,
    harness_rows,
    pair_of,
    rolling_pairs,
    scored,
    task_names,
)
from tests.tiny import tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()


def tokens(text: str) -> list[int]:
    return list(TOKENIZER(text, add_special_tokens=False)["input_ids"])


@given(st.text(st.sampled_from("abc "), min_size=1, max_size=60), st.none() | st.integers(1, 20))
def test_every_token_of_a_text_is_scored_once(text: str, positions: int | None) -> None:
    pairs = rolling_pairs(text, TOKENIZER, positions)
    assert [t for pair in pairs for t in pair.continuation] == tokens(text)
    assert pairs[0].context == (TOKENIZER.bos_token_id,)
    whole, at = [TOKENIZER.bos_token_id, *tokens(text)], 1
    for pair in pairs:  # what stands before a piece is what stands before it in the text
        assert list(pair.context) == whole[at - len(pair.context) : at]
        assert positions is None or len(pair.inputs) <= positions
        at += len(pair.continuation)
    if positions is not None and len(pairs) > 1:  # as much as the positions hold, also at the end
        assert len(pairs[-1].inputs) == positions


def test_the_likelihood_of_a_text_is_that_of_one_pass() -> None:
    model = tiny_model("llama_gqa")
    text = "The whole of this line is scored"
    with torch.no_grad():
        ids = torch.tensor([[TOKENIZER.bos_token_id, *tokens(text)]])
        log_p = model.double()(input_ids=ids).logits[0].log_softmax(-1)
    expected = float(log_p[:-1].gather(1, ids[0, 1:, None]).sum())
    model.float()
    assert scored(log_likelihoods(model, rolling_pairs(text, TOKENIZER, None))) == pytest.approx(
        expected, rel=1e-5
    )


def test_a_pair_is_tokenised_as_a_choice_is() -> None:
    assert pair_of(("a question ", "b"), TOKENIZER, 256) == encode_pair(
        "a question", " b", TOKENIZER, positions=256
    )


def test_texts_that_cannot_be_scored() -> None:
    with pytest.raises(CompressError, match="empty"):
        rolling_pairs("", TOKENIZER, 8)
    bare = tiny_tokenizer()
    bare.bos_token = bare.eos_token = None
    with pytest.raises(CompressError, match="neither a BOS nor an EOS"):
        rolling_pairs("a", bare, 8)


def test_a_request_for_text() -> None:
    found = generation_of(
        ("abcdef", {"until": ["\n", "."], "max_gen_toks": 5, "do_sample": False}), TOKENIZER, 9
    )
    assert (TOKENIZER.decode(found.prompt), found.until, found.new_tokens) == ("cdef", ("\n", "."), 5)
    plain = generation_of(("abc", {"until": "x", "temperature": 0.0}), TOKENIZER, None)
    assert (plain.until, plain.new_tokens, len(plain.prompt)) == (("x",), 256, 3)
    assert generation_of(("", {}), TOKENIZER, None).prompt == (TOKENIZER.bos_token_id,)
    options: list[dict[str, Any]] = [{"do_sample": True}, {"temperature": 0.7}, {"num_beams": 4}]
    for option in options:
        with pytest.raises(CompressError, match="decodes greedily"):
            generation_of(("abc", option), TOKENIZER, 64)
    with pytest.raises(CompressError, match="256 tokens leaves no room"):
        generation_of(("abc", {}), TOKENIZER, 256)


@given(
    st.text(st.sampled_from("ab.\n"), max_size=20),
    st.lists(st.sampled_from([".", "\n", "ab", ""]), max_size=3),
)
def test_an_answer_ends_before_its_first_end(text: str, until: list[str]) -> None:
    found = Generation(prompt=(1,), until=tuple(until), new_tokens=8).cut(text)
    assert text.startswith(found)
    assert not any(end and end in found for end in until)
    rest = text[len(found) :]
    assert rest == "" or any(end and rest.startswith(end) for end in until)


def test_results_become_records() -> None:
    results: dict[str, Any] = {
        "mine": {
            "alias": "mine",
            "acc,none": 0.25,
            "acc_stderr,none": 0.1,
            "exact_match,strict": 1,
            "exact_match_stderr,strict": "N/A",
            "sample_len": 20,
        },
        "group": {"alias": " - group"},
    }
    answer = {
        "results": results | {"whole": {"acc,none": 0.5}},
        "versions": {"mine": 1.0, "whole": "Yaml"},
        "n-shot": {"mine": 5},
        "n-samples": {"mine": {"original": 300, "effective": 20}},
    }
    line = "mine version 1.0, 20 of 300 rows, 5 examples, no BOS, lm-eval 0.4.9, float32 on cpu"
    found = harness_rows(answer, version="0.4.9", bos=False, computed="float32 on cpu")
    assert found == [
        {
            "task": "mine",
            "metric": "acc",
            "value": 0.25,
            "standard_error": 0.1,
            "protocol_line": line,
        },
        {
            "task": "mine",
            "metric": "exact_match, strict",
            "value": 1.0,
            "standard_error": None,
            "protocol_line": line,
        },
        {
            "task": "whole",
            "metric": "acc",
            "value": 0.5,
            "standard_error": None,
            "protocol_line": "whole, no BOS, lm-eval 0.4.9, float32 on cpu",
        },
    ]
    answer["n-shot"] = {"mine": 0}
    (begun, *_) = harness_rows(answer, version="1", bos=True, computed="bfloat16 on cuda")
    assert begun["protocol_line"].endswith("rows, no examples, BOS, lm-eval 1, bfloat16 on cuda")


def test_requests_begin_with_a_bos_where_that_is_asked() -> None:
    start = TOKENIZER.bos_token_id
    pair = pair_of(("abcdef", "gh"), TOKENIZER, 256, bos=True)
    assert pair == encode_pair("abcdef", "gh", TOKENIZER, bos=True)
    assert pair.context == (start, *tokens("abcdef"))
    found = generation_of(("abcdef", {"max_gen_toks": 4}), TOKENIZER, 7, bos=True)
    assert found.prompt == (start, *tokens("ef"))  # three positions are left, and the BOS has one of them
    assert generation_of(("", {}), TOKENIZER, None, bos=True).prompt == (start,)


def test_names_and_what_is_missing(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert task_names(" a, b,,a") == ["a", "b"]
    with pytest.raises(UsageError, match="names no task"):
        check_harness(" , ", None)
    with pytest.raises(UsageError, match="no folder"):
        check_harness("a", str(tmp_path / "absent"))
    monkeypatch.setattr(harness.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CompressError, match="need the package lm-eval") as caught:
        check_harness("a", str(tmp_path))
    assert "compress-llm[lm-eval]" in caught.value.remedy
