"""Markup that cannot forget to escape: only :func:`h` makes tags, everything else is text."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable

_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
_VOID = frozenset({"meta", "br", "hr", "rect", "line", "path", "circle"})


class Html(str):
    """Finished markup, inserted as it is."""

    __slots__ = ()


Child = str | Html | None | Iterable["Child"]


def text(value: str) -> Html:
    """``value`` as text for an element or a quoted attribute; characters no document may hold are replaced."""
    return Html(html.escape(_CONTROL.sub("\ufffd", value), quote=True))


def h(tag: str, *children: Child, **attributes: str | float | None) -> Html:
    """An element, well-formed as XML too.

    Args:
        tag: Element name.
        children: Text, finished markup, iterables of these; None is skipped.
        attributes: ``class_`` is written class, other underscores become hyphens; None is left out.
    """
    written = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{text(_attribute(value))}"'
        for name, value in attributes.items()
        if value is not None
    )
    inside = join(*children)
    if tag in _VOID and not inside:
        return Html(f"<{tag}{written}/>")
    return Html(f"<{tag}{written}>{inside}</{tag}>")


def join(*children: Child) -> Html:
    """Children one after another, as :func:`h` takes them."""
    parts: list[str] = []
    for child in children:
        if child is None:
            continue
        if isinstance(child, Html):
            parts.append(child)
        elif isinstance(child, str):
            parts.append(text(child))
        else:
            parts.append(join(*child))
    return Html("".join(parts))


def _attribute(value: str | float) -> str:
    return value if isinstance(value, str) else f"{value:.6g}"
