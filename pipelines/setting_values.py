"""Values of settings: read in the type they are declared with, held against their bounds."""

from __future__ import annotations

import math
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from compress.errors import UsageError, choose, nearest, shown

EFFORTS = ("quick", "standard", "paper")


def check_effort(effort: str) -> None:
    """Refuse an effort nobody knows.

    Raises:
        UsageError: ``effort`` is not in ``EFFORTS``.
    """
    if effort not in EFFORTS:
        raise UsageError(f"There is no effort {effort!r}.", choose(effort, EFFORTS))


def check_name(name: str, known: list[str]) -> None:
    """Refuse a setting nobody knows.

    Raises:
        UsageError: ``name`` is not in ``known``.
    """
    if name not in known:
        near = nearest(name, known)
        listed = f"Known settings: {', '.join(known)}." if known else "It takes none."
        raise UsageError(f"There is no setting {name!r} here.", f"Did you mean {near!r}?" if near else listed)


def as_type(name: str, value: Any, annotation: Any) -> Any:
    """The value of a setting in the type it is declared with; a recipe may write ``1e-3`` or ``16`` as text.

    Raises:
        UsageError: It cannot be read as that type, or is not among the choices.
    """
    if get_origin(annotation) is tuple:  # one value stands for a list of it
        items = value if isinstance(value, list | tuple) else [value]
        return tuple(as_type(name, item, get_args(annotation)[0]) for item in items)
    kind = next((k for k in get_args(annotation) if k is not NoneType), annotation)
    if get_origin(annotation) is Literal:
        if value not in get_args(annotation):
            raise UsageError(
                f"There is no {spelled(name)} {shown(value)}.", choose(value, get_args(annotation))
            )
        return value
    if isinstance(value, bool) == (kind is bool) and isinstance(value, str | int | float):
        if kind is bool or isinstance(value, kind):
            return value
        try:
            result = kind(value)
        except (ValueError, OverflowError):
            result = None
        if result is not None and (kind is not int or not isinstance(value, float) or result == value):
            return result
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    raise UsageError(f"The setting {spelled(name)} cannot be {shown(value)}.", f"Give {words[kind]}.")


def spelled(name: str) -> str:
    """A setting's name as the command line spells it."""
    return name.replace("_", "-")


def check_least(settings: Any, **least: int) -> None:
    """Refuse numbers below their least value.

    Raises:
        UsageError: A setting is below the bound that is given under its name; None passes.
    """
    for name, bound in least.items():
        value = getattr(settings, name)
        if value is not None and value < bound:
            raise UsageError(f"--{spelled(name)} {value} is too small.", f"Give {bound} or more.")


def check_positive(settings: Any, *names: str) -> None:
    """Refuse numbers that are not above zero.

    Raises:
        UsageError: One of the settings ``names`` is not above zero, or not finite.
    """
    for name in names:
        value = getattr(settings, name)
        if not 0 < value < math.inf:
            raise UsageError(f"--{spelled(name)} {value} is not above zero.", "Give a number such as 3e-4.")
