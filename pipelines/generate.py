"""``compress generate``: one prompt through several models of the chain, side by side; nothing is written."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from jinja2 import TemplateError

from compress.data.chat import tokenise
from compress.errors import CompressError, UsageError
from compress.evaluate.generation import Generated, generate
from compress.model.load import load_tokenizer
from compress.pipelines.chain_models import ChainModel, chosen, located
from compress.pipelines.measure import positions
from compress.pipelines.model_input import device_and_dtype
from compress.pipelines.settings import DEFAULT_RUN
from compress.pipelines.side_by_side import Column, SideBySide
from compress.pipelines.stage import Context
from compress.pipelines.tool_settings import GenerateSettings
from compress.pipelines.workspace import workspace_nearby

STDIN = "-"


def generate_texts(context: Context, settings: GenerateSettings) -> dict[str, Any]:
    """Continue the prompt with every chosen model, one after the other, so that one is in memory at a time.

    Returns:
        ``prompt_tokens``, whether the chat template was used (``chat``), and one row a model: ``name``, ``text``,
        ``tokens``, ``stopped``, ``prefill_seconds``, ``tokens_per_second``.

    Raises:
        UsageError: No chain in the workspace that was named, an empty prompt, a model the chain does not have,
            ``--chat`` without a template, or more tokens than the model has positions.
        CompressError: A model cannot be opened, or the prompt cannot be read.
    """
    refuse_no_chain(context)
    models = located(context, chosen(context.workspace, settings.models))
    prompt = read_prompt(settings.prompt)
    tokenizer = load_tokenizer(models[0].model)
    ids, chat = prompt_ids(prompt, tokenizer, settings.chat)
    most = min(positions(model.model) for model in models)
    if len(ids) + settings.tokens > most:
        raise UsageError(
            f"A prompt of {len(ids)} tokens and {settings.tokens} new ones are more than the model's {most} positions.",
            f"Give --tokens {most - len(ids)} or less." if len(ids) < most else "Give a shorter prompt.",
        )
    view = SideBySide(context.reporter, [model.title for model in models])
    rows = []
    for place, model in enumerate(models):
        with view.writing(place) as show:
            made = write(context, model, ids, settings, partial(_shown, show, tokenizer))
        column = Column(text=decode(tokenizer, made.ids), note=note(made))
        view.finish(place, column)
        rows.append({"name": model.name, "text": column.text, **numbers(made)})
    view.end()
    return {"prompt_tokens": len(ids), "chat": chat, "models": rows}


def refuse_no_chain(context: Context) -> None:
    """Refuse a workspace that was named and is not there; without any name, the default model is shown.

    Raises:
        UsageError: As said.
    """
    root, common = context.workspace.root, context.common
    if context.workspace.model is None and common.model is None and root != DEFAULT_RUN:
        near = workspace_nearby(root)
        remedy = "Make one, or name a model with --model." if near is None else f"Did you mean --run {near}?"
        raise UsageError(f"There is no chain in {root}.", remedy)


def read_prompt(given: str) -> str:
    """The prompt itself, or all of standard input for ``-``, without its last line end.

    Raises:
        UsageError: It is empty.
        CompressError: Standard input is no text.
    """
    if given != STDIN:
        prompt = given
    else:
        try:
            prompt = sys.stdin.read().removesuffix("\n")
        except UnicodeDecodeError as error:
            raise CompressError("Standard input is no text in UTF-8.", "Pipe text into it.") from error
    if not prompt.strip():
        raise UsageError("The prompt is empty.", "Give some text, or - and text on standard input.")
    return prompt


def prompt_ids(prompt: str, tokenizer: Any, chat: bool | None) -> tuple[list[int], bool]:
    """Token ids of the prompt, and whether the tokenizer's chat template is around it.

    Args:
        prompt: The text.
        tokenizer: Of the models.
        chat: Use the template or do not; None uses it where there is one.

    Raises:
        UsageError: There is no template.
        CompressError: The template refuses a single question.
    """
    if chat is None:
        chat = bool(tokenizer.chat_template)
    if not chat:
        return list(tokenizer(prompt, verbose=False)["input_ids"]), False
    if not tokenizer.chat_template:
        raise UsageError("The model's tokenizer has no chat template.", "Leave --chat out.")
    try:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
    except TemplateError as error:
        raise CompressError(
            f"The tokenizer's chat template refuses the question ({error}).", "Give --no-chat."
        ) from error
    return tokenise(text, tokenizer), True


def write(
    context: Context,
    model: ChainModel,
    ids: Sequence[int],
    settings: GenerateSettings,
    each: Callable[[list[int]], None],
) -> Generated:
    """Open one model, let it write, and give its memory back."""
    device, dtype = device_and_dtype(context.common)
    network: Any = model.open(device, dtype)
    try:
        return generate(
            network,
            ids,
            tokens=settings.tokens,
            temperature=settings.temperature,
            seed=context.common.seed,
            each=each,
        )
    finally:
        del network
        gc.collect()
        if torch.device(device).type == "cuda":
            torch.cuda.empty_cache()


def decode(tokenizer: Any, ids: Sequence[int]) -> str:
    """Text of the new tokens; a character of which only some bytes are there yet is left out."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=True)).rstrip("\ufffd")


def _shown(show: Callable[[str], None], tokenizer: Any, new: Sequence[int]) -> None:
    show(decode(tokenizer, new))


def numbers(made: Generated) -> dict[str, Any]:
    """The figures of a text as JSON values."""
    return {
        "tokens": len(made.ids),
        "stopped": made.stopped,
        "prefill_seconds": made.prefill_seconds,
        "tokens_per_second": made.tokens_per_second,
    }


def note(made: Generated) -> str:
    """The figures of a text in one line."""
    speed = "" if made.tokens_per_second is None else f", {made.tokens_per_second:.1f} tokens/s"
    end = ", ended by itself" if made.stopped == "end" else ""
    count = f"{len(made.ids)} token{'' if len(made.ids) == 1 else 's'}"
    return f"{count}{speed}, prompt read in {made.prefill_seconds:.2f} s{end}"
