"""A recipe as text: what is chosen stands as it is, every other option as a comment with its default and meaning."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml

from compress.pipelines.recipe import READERS, SHARED_KEYS
from compress.pipelines.settings import VERBS, Common, resolve

WIDTH = 110
HOW_TO = (
    "A line of # and a name is an option with the value it has when it is left out: take the # away to change it. "
    "A line of ## says what the option below it means. An empty value is none."
)

Meanings = Mapping[str, Mapping[str, str]]
"""Verb -> option -> what ``--help`` says of it."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """What a recipe is written from.

    Attributes:
        head: Paragraphs for its head: what it is for.
        shared: Shared options that are chosen, ``effort`` among them.
        defaults: What the other shared options are here.
        steps: Verbs in order, with the settings that are chosen.
    """

    head: Sequence[str]
    shared: Mapping[str, Any]
    defaults: Mapping[str, Any]
    steps: Sequence[tuple[str, Mapping[str, Any]]]


def recipe_text(draft: Draft, meanings: Meanings) -> str:
    """The file that ``compress run`` reads."""
    lines = [line for paragraph in (*draft.head, HOW_TO) for line in _wrapped(paragraph, "# ")]
    lines.append("")
    for name in SHARED_KEYS:
        meaning = next((of[name] for of in meanings.values() if name in of), "")
        lines += _option(name, meaning, "", draft.shared, {**_plain_defaults(), **draft.defaults})
    lines += ["", "steps:"]
    for verb, chosen in draft.steps:
        lines += _step(verb, chosen, str(draft.shared["effort"]), meanings.get(verb, {}))
    return "\n".join(lines) + "\n"


def _step(verb: str, chosen: Mapping[str, Any], effort: str, meanings: Mapping[str, str]) -> Iterator[str]:
    if verb not in VERBS:  # report takes no settings
        yield f"  - {verb}"
        return
    settings: Any = resolve(VERBS[verb], chosen, effort)
    yield f"  - {verb}:"
    if verb in READERS:
        yield "      ## For this step alone; the shared text where it is left out."
        yield "      # data:"
    own = VERBS[verb].__annotations__  # before what a verb shares with others
    for field in sorted(dataclasses.fields(settings), key=lambda field: field.name not in own):
        default = getattr(settings, field.name)
        yield from _option(field.name, meanings.get(field.name, ""), " " * 6, chosen, {field.name: default})


def _option(
    name: str, meaning: str, indent: str, chosen: Mapping[str, Any], defaults: Mapping[str, Any]
) -> Iterator[str]:
    yield from _wrapped(meaning, f"{indent}## ")
    if name in chosen:
        yield f"{indent}{name}: {scalar(chosen[name])}"
    else:
        yield f"{indent}# {name}: {scalar(defaults.get(name))}".rstrip()


def scalar(value: Any) -> str:
    """A value as YAML reads it back; None as nothing."""
    if value is None:
        return ""
    return yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True).split("\n")[0]


def _wrapped(text: str, prefix: str) -> list[str]:
    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent=prefix,
        subsequent_indent=prefix,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _plain_defaults() -> dict[str, Any]:
    return {field.name: field.default for field in dataclasses.fields(Common)}
