"""What the shell completes after an option: choices, names and files, found without loading a library."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from compress.importance import CRITERIA
from compress.pipelines.settings import VERBS
from compress.pipelines.tool_settings import ExportSettings

Completer = Callable[[str], list[str]]
"""From what was typed to what it can become."""

DEVICES = ("auto", "cpu", "cuda")
DTYPES = ("auto", "bfloat16", "float16", "float32")
MODELS = ("smollm2-135m",)
SOLVERS = ("cbc", "dynamic", "highs", "lagrangian")
TEXTS = ("c4", "pydoc", "self", "wikitext2")
CHAIN_MODELS = ("original", "pruned", "aligned", "quantized", "trained", "recovered", "all")
TEXT_FILES = (".jsonl", ".parquet", ".txt")
"""Written down again because their own modules load torch or numpy; a contract test compares them."""


def completer(verb: str, option: str) -> Completer | None:
    """What completes the values of a verb's own option: its choices, or names it takes; None where it is free."""
    if (verb, option) == ("run", "recipe"):
        return lambda incomplete: _begin(
            incomplete, [*shipped_recipes(), *_files(incomplete, (".yaml", ".yml"))]
        )
    if option in _NAMED:
        return _NAMED[option]
    annotation = _types(verb).get(option)
    return among(get_args(annotation)) if get_origin(annotation) is Literal else None


def among(names: Iterable[str]) -> Completer:
    """A completer of fixed names."""
    known = list(names)
    return lambda incomplete: _begin(incomplete, known)


def model(incomplete: str) -> list[str]:
    """The embedded model, folders and GGUF files."""
    return _begin(incomplete, [*MODELS, *_files(incomplete, (".gguf",))])


def data(incomplete: str) -> list[str]:
    """Named text sources, folders and text files."""
    return _begin(incomplete, [*TEXTS, *_files(incomplete, TEXT_FILES)])


def shipped_recipes() -> list[str]:
    """Names of the recipes that ship, read from the folder."""
    spec = importlib.util.find_spec("compress.pipelines.recipes")
    folders = (spec.submodule_search_locations if spec is not None else None) or ()
    return sorted(file.stem for folder in folders for file in Path(folder).glob("*.yaml"))


@cache
def _types(verb: str) -> dict[str, Any]:
    kinds = {**VERBS, "export": ExportSettings}
    return get_type_hints(kinds[verb]) if verb in kinds else {}


def _begin(typed: str, names: Iterable[str]) -> list[str]:
    return [name for name in names if name.startswith(typed)]


def _files(typed: str, suffixes: tuple[str, ...]) -> Iterator[str]:
    """Folders (with a slash behind) and files of these kinds, spelled as they were begun."""
    head, slash, _ = typed.rpartition("/")
    folder = Path(head + slash).expanduser()
    try:
        entries = sorted(folder.iterdir())
    except OSError:  # no such folder: nothing to offer
        return
    for entry in entries:
        if entry.is_dir() or entry.suffix in suffixes:
            yield f"{head}{slash}{entry.name}" + ("/" if entry.is_dir() else "")


_NAMED: dict[str, Completer] = {
    "criterion": lambda incomplete: _begin(incomplete, CRITERIA.names()),
    "solver": among(SOLVERS),
    "targets": among(("heads", "mlp", "heads,mlp")),
    "adapter_targets": among(("all", "lm_head", "all,lm_head")),
    "models": among(CHAIN_MODELS),
    "what": among(CHAIN_MODELS[1:-1]),
    "model": model,
    "onto": model,
}
