"""Errors a user can act on: one sentence of cause, one of remedy, with the name that was probably meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class CompressError(Exception):
    """A failure with a known cause.

    Args:
        cause: One sentence: what went wrong, with the offending value.
        remedy: One sentence: what to do about it.
    """

    exit_code = 1

    def __init__(self, cause: str, remedy: str) -> None:
        super().__init__(cause, remedy)
        self.cause = cause
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.cause} {self.remedy}"


class UsageError(CompressError):
    """The request itself is wrong (option, ratio, budget, recipe key): exit code 2."""

    exit_code = 2


def nearest(given: str, names: Iterable[str]) -> str | None:
    """The name that ``given`` is most like, whatever its case; None where no name is much like it."""
    spelled = {name.lower(): name for name in names}
    near = difflib.get_close_matches(given.lower(), spelled, n=1)
    return spelled[near[0]] if near else None


def choose(given: object, names: Iterable[str]) -> str:
    """The remedy for something that is not among ``names``: the nearest of them, and which there are."""
    known = list(names)
    near = nearest(given, known) if isinstance(given, str) else None
    if near is None:
        return f"Choose one of: {', '.join(known)}."
    return f"Did you mean {near!r} (one of: {', '.join(known)})?"
