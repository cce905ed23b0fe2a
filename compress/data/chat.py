"""Conversations to tokens through the tokenizer's chat template, with labels on the answers only."""

from __future__ import annotations

from typing import Any

from jinja2 import TemplateError

from compress.data.text import Conversation
from compress.errors import CompressError

IGNORE = -100
"""Label of a token that is neither scored nor trained on."""

FALLBACK_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] | capitalize + ':\n' + m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:\n' }}{% endif %}"
)
"""Used when the tokenizer has no template of its own: ``User:``, the question, a blank line,
``Assistant:``, the answer and the end-of-text token."""


def encode_conversation(conversation: Conversation, tokenizer: Any) -> tuple[list[int], list[int]]:
    """Render one conversation and tokenise it.

    Prompt and answer are tokenised apart, as they are when the model is asked; labels are -100 on
    everything but the answers and what the template writes after them (the end-of-turn token). Turns after
    the last answer are dropped. Where a template rewrites earlier turns (reasoning models), only the last
    answer is labelled.

    Returns:
        Token ids and labels, of one length.

    Raises:
        CompressError: The template refuses the conversation, or its prompt is not a prefix of the whole.
    """
    answers = [i for i, message in enumerate(conversation) if message.role == "assistant"]
    messages = [{"role": m.role, "content": m.content} for m in conversation[: answers[-1] + 1]]
    whole = _render(messages, tokenizer, prompt=False)
    spans = [
        (len(prompt), len(through))
        for i in answers
        if whole.startswith(prompt := _render(messages[:i], tokenizer, prompt=True))
        and whole.startswith(through := _render(messages[: i + 1], tokenizer, prompt=False))
        and len(prompt) < len(through)
    ]
    if not spans or spans[-1][1] != len(whole):
        raise CompressError(
            "The tokenizer's chat template does not keep the prompt in front of the answer.",
            'Give plain text rows ({"text"}), or a tokenizer with another chat template.',
        )
    ids: list[int] = []
    labels: list[int] = []
    position = 0
    for start, stop in spans:
        prompt_ids = tokenise(whole[position:start], tokenizer)
        answer_ids = tokenise(whole[start:stop], tokenizer)
        ids += prompt_ids + answer_ids
        labels += [IGNORE] * len(prompt_ids) + answer_ids
        position = stop
    return ids, labels


def tokenise(text: str, tokenizer: Any) -> list[int]:
    """Token ids of a text of any length, without special tokens of the tokenizer's own."""
    # verbose=False: windows are cut afterwards, so a text longer than the context is no reason to warn.
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]) if text else []


def _render(messages: list[dict[str, str]], tokenizer: Any, *, prompt: bool) -> str:
    if not messages and not prompt:
        return ""
    template = None if tokenizer.chat_template else FALLBACK_TEMPLATE
    try:
        return str(
            tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=prompt, chat_template=template
            )
        )
    except TemplateError as error:
        raise CompressError(
            f"The tokenizer's chat template refuses a conversation ({error}).",
            "Drop the roles or turns it does not know, or give plain text rows.",
        ) from error
