"""Wrong usage that the parser finds, in the words of every other failure: one sentence of cause, one of remedy."""

from __future__ import annotations

from typing import Any

import typer

from compress.errors import UsageError, nearest

WrongUsage: type[Exception] = typer.BadParameter.__bases__[0]
"""The parser's own error, of click or of the copy of it that newer versions of typer carry."""


def usage_error(error: Any) -> UsageError | None:
    """The parser's ``error`` (a ``WrongUsage``) as ours, with the option that was probably meant.

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
    sentence = " ".join(error.format_message().split()).rstrip(".")
    return UsageError(f"{sentence}.", see)


def _options(context: Any) -> list[str]:
    """Every spelling of every option of the command that was being read."""
    if context is None:
        return []
    return [name for p in context.command.get_params(context) for name in (*p.opts, *p.secondary_opts)]
