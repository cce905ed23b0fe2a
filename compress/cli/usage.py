"""Wrong usage that the parser finds, in the words of every other failure: one sentence of cause, one of remedy."""

from __future__ import annotations

from typing import Any

import typer

from compress.errors import UsageError, choose, nearest

WrongUsage: type[Exception] = typer.BadParameter.__bases__[0]
"""The parser's own error, of click or of the copy of it that typer carries since 0.26."""


def usage_error(error: Any) -> UsageError | None:
    """The parser's ``error`` (a ``WrongUsage``) as ours, with the option or verb that was probably meant.

    Returns:
        None when nothing is wrong but that ``compress`` was called without a verb, and its help was shown.
    """
    if type(error).__name__ == "NoArgsIsHelpError":
        return None
    context = error.ctx
    command = context.command_path if context is not None else "compress"
    see = f"See what there is with {command} --help."
    option = getattr(error, "option_name", None)
    if option is not None and hasattr(error, "possibilities"):
        near = nearest(option, _options(context))
        remedy = see if near is None else f"Did you mean {near!r}?"
        return UsageError(f"{command} has no option {option!r}.", remedy)
    wrong = _unknown_verb(error)
    if wrong is not None:
        return UsageError(
            f"There is no command {wrong!r}.", choose(wrong, context.command.list_commands(context))
        )
    sentence = " ".join(error.format_message().split()).rstrip(".")
    return UsageError(f"{sentence}.", see)


def _options(context: Any) -> list[str]:
    """Every spelling of every option of the command that was being read."""
    if context is None:
        return []
    return [name for p in context.command.get_params(context) for name in (*p.opts, *p.secondary_opts)]


def _unknown_verb(error: Any) -> str | None:
    """The word that should have been a verb; None when something else is wrong."""
    context = error.ctx
    listed = getattr(context.command, "list_commands", None) if context is not None else None
    if listed is None or not error.message.startswith("No such command "):
        return None
    rest = str(error.message).removeprefix("No such command ")
    return rest[1:].split(rest[0])[0]
