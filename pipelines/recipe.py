"""Recipes: a chain of verbs with their settings, as plain data."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from compress.pipelines.report import report
from compress.pipelines.settings import VERBS, Common, check_name
from compress.pipelines.stage import Context

from compress.errors import UsageError

FOLDER = Path(__file__).parent / "recipes"
SHARED_KEYS = ("model", "data", "effort", "seed", "dtype", "device")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Shared options and the steps, in order."""

    name: str
    shared: Mapping[str, Any]
    steps: Sequence[tuple[str, Mapping[str, Any]]]


def shipped() -> list[str]:
    """Names of the recipes that ship with the package."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def read_recipe(name: str) -> Recipe:
    """Read and check a recipe: a file, or the name of a shipped one.

    The file is a mapping with shared options (``model``, ``data``, ``effort``, ``seed``, ``dtype``,
    ``device``) and ``steps``, a list whose items are a verb or a mapping from one verb to its settings.

    Raises:
        UsageError: No such recipe, not a mapping, an unknown verb or an unknown setting.
    """
    path = Path(name)
    if not path.is_file() and name in shipped():
        path = FOLDER / f"{name}.yaml"
    if not path.is_file():
        raise UsageError(f"There is no recipe {name!r}.", f"Give a file, or one of: {', '.join(shipped())}.")
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{name} is not YAML ({' '.join(str(error).split())}).", "Mend the file.") from error
    if not isinstance(data, dict) or not isinstance(data.get("steps"), list) or not data["steps"]:
        raise UsageError(f"{name} has no list of steps.", "Write 'steps:' with one verb per item.")
    for key in data:
        check_name(str(key), [*SHARED_KEYS, "steps"])
    steps = [_step(item, name) for item in data["steps"]]
    return Recipe(name=path.stem, shared={k: v for k, v in data.items() if k != "steps"}, steps=steps)


def _step(item: Any, name: str) -> tuple[str, Mapping[str, Any]]:
    verb, settings = next(iter(item.items())) if isinstance(item, dict) and len(item) == 1 else (item, {})
    if verb not in {*VERBS, "report"}:
        raise UsageError(
            f"{name} has a step that is no verb: {item!r}.", f"Use: {', '.join([*VERBS, 'report'])}."
        )
    if settings is None:
        settings = {}
    if not isinstance(settings, dict):
        raise UsageError(
            f"The settings of {verb} in {name} are no mapping.", "Write them as 'name: value' lines."
        )
    known = [] if verb == "report" else [field.name for field in dataclasses.fields(VERBS[verb])]
    for key in settings:
        check_name(str(key), known)
    return verb, settings


def apply_shared(recipe: Recipe, common: Common) -> Common:
    """Fill the recipe's shared options in where the command line left the defaults."""
    defaults = Common()
    values = {k: v for k, v in recipe.shared.items() if getattr(common, k) == getattr(defaults, k)}
    return dataclasses.replace(common, **values)


def run_recipe(context: Context, recipe: Recipe) -> dict[str, Any]:
    """Run every step in order; finished steps with the same settings are skipped, as on the command line."""
    from compress.pipelines.dispatch import run_stage_verb

    results = []
    for verb, settings in recipe.steps:
        context.reporter.say(f"[{recipe.name}] {verb}")
        if verb == "report":
            results.append({"verb": "report", "report": str(report(context))})
            continue
        outcome = run_stage_verb(context, verb, settings)
        if outcome.stage is not None:
            results.append({"path": str(outcome.stage.path), **outcome.stage.record})
    return {"recipe": recipe.name, "stages": results}
