from __future__ import annotations

import pytest

from compress.data.chat import encode_conversation
from compress.data.text import Message
from compress.errors import CompressError
from tests.tiny import tiny_tokenizer

TURNS = tuple(
    Message(role=role, content=content)
    for role, content in (
        ("system", "be kind"),
        ("user", "one"),
        ("assistant", "two"),
        ("user", "three"),
        ("assistant", "four"),
    )
)


def _parts(ids: list[int], labels: list[int], tokenizer: object) -> tuple[str, str]:
    assert len(ids) == len(labels)
    assert all(label in (-100, token) for token, label in zip(ids, labels, strict=True))
    answers = [token for token in labels if token != -100]
    return tokenizer.decode(ids), tokenizer.decode(answers)  # type: ignore[attr-defined]


def test_every_answer_is_labelled_and_ids_are_the_template_s() -> None:
    tokenizer = tiny_tokenizer()
    ids, labels = encode_conversation(TURNS, tokenizer)
    messages = [{"role": m.role, "content": m.content} for m in TURNS]
    expected = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    assert ids == expected
    assert _parts(ids, labels, tokenizer)[1] == "two</s>\nfour</s>\n"


def test_turns_after_the_last_answer_are_dropped() -> None:
    tokenizer = tiny_tokenizer()
    assert encode_conversation((*TURNS, Message(role="user", content="five")), tokenizer) == (
        encode_conversation(TURNS, tokenizer)
    )


def test_fallback_without_a_template() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    whole, answers = _parts(*encode_conversation(TURNS[1:3], tokenizer), tokenizer)
    assert whole == "User:\none\n\nAssistant:\ntwo</s>\n\n"
    assert answers == "two</s>\n\n"


def test_template_that_rewrites_history_labels_the_last_answer_only() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: "
        "{% if m['role'] == 'assistant' and loop.last %}think {% endif %}"
        "{{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    whole, answers = _parts(*encode_conversation(TURNS, tokenizer), tokenizer)
    assert "assistant: two\n" in whole
    assert answers == "think four\n"


def test_templates_that_cannot_serve_are_one_sentence() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('System role not supported') }}"
    with pytest.raises(CompressError, match="System role not supported"):
        encode_conversation(TURNS, tokenizer)
    tokenizer.chat_template = "{{ messages | length }}{{ messages[-1]['content'] }}"
    with pytest.raises(CompressError, match="does not keep the prompt"):
        encode_conversation(TURNS, tokenizer)
