"""Recipes: a chain of verbs with their settings, as plain data."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from compress.errors import UsageError, nearest, shown
from compress.pipelines.report import report
from compress.pipelines.setting_values import EFFORTS, as_type, check_name
from compress.pipelines.settings import VERBS, Common, resolve
from compress.pipelines.stage import Context, settings_dict, show_plan

FOLDER = Path(__file__).parent / "recipes"
SHARED_KEYS = ("model", "data", "effort", "seed", "dtype", "device")
READERS = ("prune", "align", "quantize", "train", "eval")
"""Steps that read text, which may have a ``data`` of their own."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Shared options and the steps, in order.

    Attributes:
        name: The file's, without its ending.
        shared: Options of all steps.
        steps: Verbs with their settings.
        texts: Verb -> its own text source, of those that name one.
    """

    name: str
    shared: Mapping[str, Any]
    steps: Sequence[tuple[str, Mapping[str, Any]]]
    texts: Mapping[str, str] = dataclasses.field(default_factory=dict)


def shipped() -> list[str]:
    """Names of the recipes that ship with the package."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def read_recipe(name: str) -> Recipe:
    """Read and check a recipe: a file, or the name of a shipped one.

    The file is a mapping with shared options (``model``, ``data``, ``effort``, ``seed``, ``dtype``,
    ``device``) and ``steps``, a list whose items are a verb or a mapping from one verb to its settings. A step that
    reads text may have a ``data`` of its own beside its settings.

    Raises:
        UsageError: No such recipe, not a mapping, an unknown verb, a verb twice, an unknown setting, or a value
            that the setting cannot have.
    """
    path = Path(name)
    if not path.is_file() and name in shipped():
        path = FOLDER / f"{name}.yaml"
    if not path.is_file():
        beside = {file.stem: str(file) for file in path.parent.glob("*.y*ml")} if path.parent.is_dir() else {}
        near = nearest(path.stem, [*shipped(), *beside])
        raise UsageError(
            f"There is no recipe {name!r}.",
            f"Give a file, or one of: {', '.join(shipped())}."
            if near is None
            else f"Did you mean {beside.get(near, near)!r}?",
        )
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise UsageError(f"{name} is not a text file in UTF-8.", "Give a YAML file.") from error
    except (
        ValueError,
        KeyError,
        AttributeError,
        TypeError,
        RecursionError,
    ) as error:  # as !!timestamp x or !!bool x
        raise UsageError(
            f"{name} holds a value that YAML has no such type for.", "Write plain values."
        ) from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" (line {mark.line + 1})" if mark is not None else ""
        raise UsageError(f"{name} is not YAML{where}.", "Mend that line.") from error
    if not isinstance(data, dict) or not isinstance(data.get("steps"), list) or not data["steps"]:
        raise UsageError(f"{name} has no list of steps.", "Write 'steps:' with one verb per item.")
    for key in data:
        check_name(str(key), [*SHARED_KEYS, "steps"])
    parts = [_step(item, name) for item in data["steps"]]
    steps = [(verb, settings) for verb, settings, _ in parts]
    texts = {verb: text for verb, _, text in parts if text is not None}
    verbs = [verb for verb, _ in steps]
    for verb in VERBS:
        if verbs.count(verb) > 1:
            raise UsageError(
                f"{name} has the step {verb} twice.", "Keep one of them: a chain has one stage of each verb."
            )
    types = get_type_hints(Common)
    shared = {k: as_type(k, v, types[k]) for k, v in data.items() if k != "steps" and v is not None}
    return Recipe(name=path.stem, shared=shared, steps=steps, texts=texts)


def _step(item: Any, name: str) -> tuple[str, Mapping[str, Any], str | None]:
    """Verb, settings and own text source of one step."""
    verb, settings = next(iter(item.items())) if isinstance(item, dict) and len(item) == 1 else (item, {})
    if not isinstance(verb, str) or verb not in {*VERBS, "report"}:
        raise UsageError(
            f"{name} has a step that is no verb: {shown(item)}.", f"Use: {', '.join([*VERBS, 'report'])}."
        )
    if settings is None:
        settings = {}
    if not isinstance(settings, dict):
        raise UsageError(
            f"The settings of {verb} in {name} are no mapping.", "Write them as 'name: value' lines."
        )
    if verb == "report":
        for key in settings:
            check_name(str(key), [])
        return verb, settings, None
    given = {str(key): value for key, value in settings.items()}
    text = given.pop("data", None)
    if "data" in settings and verb not in READERS:
        raise UsageError(
            f"The step {verb} of {name} reads no text, and has a data of its own.",
            f"Give it to one of: {', '.join(READERS)}.",
        )
    resolve(VERBS[verb], given, EFFORTS[0])
    return verb, given, None if text is None else as_type("data", text, str)


def apply_shared(recipe: Recipe, common: Common) -> Common:
    """Fill the recipe's shared options in where the command line left the defaults."""
    defaults = Common()
    values = {k: v for k, v in recipe.shared.items() if getattr(common, k) == getattr(defaults, k)}
    return dataclasses.replace(common, **values)


def run_recipe(context: Context, recipe: Recipe) -> dict[str, Any]:
    """Run every step in order; finished steps with the same settings are skipped, as on the command line.

    The text of a step is its own, and where it names none the common one.

    On a dry run, the first step that would run is checked against its input; those after it are only shown.
    """
    from compress.pipelines.dispatch import run_stage_verb

    results: list[Mapping[str, Any]] = []
    planned, whole = False, context
    for verb, settings in recipe.steps:
        own = recipe.texts.get(verb)
        context = whole if own is None else _reading(whole, own)
        context.reporter.say(f"[{recipe.name}] {verb}" + ("" if own is None else f", which reads {own}"))
        if planned:
            results.append(_plan(context, verb, settings))
        elif verb == "report" and context.common.dry_run:
            results.append({"verb": verb})
        elif verb == "report":
            results.append({"verb": verb, "report": str(report(context))})
        else:
            outcome = run_stage_verb(context, verb, settings)
            planned = outcome.stage is None
            results.append(outcome.summary())
    return {"recipe": recipe.name, "stages": results}


def _reading(context: Context, source: str) -> Context:
    """The same with another text."""
    return dataclasses.replace(context, common=dataclasses.replace(context.common, data=source))


def _plan(context: Context, verb: str, settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a step would run with, as far as it can be said before its input is there."""
    if verb == "report":
        return {"verb": verb}
    config = settings_dict(resolve(VERBS[verb], settings, context.common.effort or EFFORTS[0]))
    show_plan(context.reporter, verb, config)
    return {"verb": verb, "config": config}
