"""Errors a user can act on: one sentence of cause, one of remedy."""

from __future__ import annotations


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
