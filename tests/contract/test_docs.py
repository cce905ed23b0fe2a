"""What the documents say about commands, names and files is what the code does."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
import torch
import typer
import yaml

from compress.__main__ import app
from compress.data.sources import SOURCES
from compress.importance import CRITERIA
from compress.model.family import FAMILIES
from compress.pipelines.prune_goal import DEFAULT_RATIO
from compress.pipelines.recipe import read_recipe, shipped
from compress.pipelines.setting_values import EFFORTS
from compress.pipelines.settings import VERBS, resolve
from compress.pipelines.tool_settings import GenerateSettings, InitSettings
from compress.solvers.solve import SOLVERS
from tests.sources import ROOT
from tests.tiny import tiny_model
from tests.unit.prune.common import model_architecture

PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
TEXT = {page.name: page.read_text(encoding="utf-8") for page in PAGES}
COMMANDS = TEXT["commands.md"]
SHARED = {
    "run",
    "model",
    "data",
    "device",
    "dtype",
    "seed",
    "threads",
    "effort",
    "memory_limit",
    "redo",
    "dry_run",
    "json_",
    "debug",
}
WORDS = {
    ("eval", "task_delimiter"): "a space",
    ("prune", "multiple"): "by width",
    ("prune", "ratio"): f"{DEFAULT_RATIO:g}",
    ("prune", "skip_first"): "a tenth",
}
"""Defaults that are no constant, and the words for them."""


def section(title: str) -> str:
    """The part of commands.md under ``## title``."""
    parts = re.split(r"^## ", COMMANDS, flags=re.MULTILINE)
    return next(part for part in parts if part.startswith(f"{title}\n"))


def commands() -> dict[str, Any]:
    group: Any = typer.main.get_command(app)
    return dict(group.commands)


def blocks(language: str) -> list[tuple[str, str]]:
    return [
        (name, code)
        for name, text in TEXT.items()
        for code in re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    ]


def written(value: Any) -> str:
    if value in (None, "", ()):
        return "none"
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:g}" if isinstance(value, float) else str(value)


@pytest.mark.parametrize("verb", sorted(commands()))
def test_every_option_is_described_where_its_verb_is(verb: str) -> None:
    for parameter in commands()[verb].params:
        if parameter.param_type_name == "argument":
            assert parameter.name.upper() in section(verb)
            continue
        place = section("Common options" if parameter.name in SHARED else verb)
        for option in parameter.opts:
            assert re.search(rf"^\| `{option}` \|", place, re.MULTILINE), f"{verb} {option}"
    assert f"`{verb}`" in TEXT["README.md"]


@pytest.mark.parametrize("verb", sorted(VERBS))
def test_defaults_are_those_of_every_effort(verb: str) -> None:
    by_effort = [resolve(VERBS[verb], {}, effort) for effort in EFFORTS]
    for field in dataclasses.fields(VERBS[verb]):
        fixed = WORDS.get((verb, field.name))
        cells = [fixed or written(getattr(settings, field.name)) for settings in by_effort]
        row = f"| `--{field.name.replace('_', '-')}` | {' | '.join(cells)} |"
        assert row in section(verb), f"docs/commands.md, {verb}, needs the row {row}"


@pytest.mark.parametrize(
    ("verb", "kind", "names"),
    [("generate", GenerateSettings, ("tokens", "temperature")), ("init", InitSettings, ("out", "force"))],
)
def test_defaults_without_an_effort_are_those_of_the_code(
    verb: str, kind: type, names: tuple[str, ...]
) -> None:
    defaults = {field.name: field.default for field in dataclasses.fields(kind)}
    for name in names:
        assert f"| `--{name}` | {written(defaults[name])} |" in section(verb)
    for parameter in commands()[verb].params:
        stated = re.search(r"default (\S+?)[);]", parameter.help or "")
        if parameter.name in names and stated is not None:
            assert stated.group(1) == written(defaults[parameter.name])


def test_nothing_is_described_that_is_not_there() -> None:
    parameters = [p for command in commands().values() for p in command.params]
    known = {option for p in parameters for option in (*p.opts, *p.secondary_opts)}
    known |= {"--help", "--install-completion", "--show-completion"}
    documents = "\n".join(text for name, text in TEXT.items() if name != "development.md")
    foreign = {
        "--no-deps",
        "--quick",
        "--markdown",
        "--write-table",
        "--peer",
        "--ranks",
        "--rato",  # the typing error of the first ten minutes
    }  # pip's and the benchmarks'
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", documents)) - foreign <= known


def test_every_name_one_can_choose_is_documented() -> None:
    names = {*SOLVERS, *SOURCES, *CRITERIA.names(), *FAMILIES.names(), *shipped(), *EFFORTS}
    for kind in VERBS.values():
        for annotation in get_type_hints(kind).values():
            names |= set(get_args(annotation)) if get_origin(annotation) is Literal else set()
    documents = TEXT["README.md"] + COMMANDS + TEXT["recipes.md"]
    assert {name for name in names if f"`{name}`" not in documents} == set()


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_paths_of_the_code_exist() -> None:
    pattern = r"`((?:compress|pipelines|solvers|benchmarks|tests|docs)/[\w./-]*)`"
    named = {(name, path) for name, text in TEXT.items() for path in re.findall(pattern, text)}
    example = ("extending.md", "compress/importance/peak.py")
    assert [(name, path) for name, path in named - {example} if not (ROOT / path).exists()] == []


@pytest.mark.parametrize(("page", "code"), blocks("yaml"))
def test_recipes_are_read(page: str, code: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(code, encoding="utf-8")
    recipe = read_recipe(str(path))
    for verb, settings in recipe.steps:
        if verb != "report":
            resolve(VERBS[verb], settings, "quick")
    assert len(recipe.steps) == len(yaml.safe_load(code)["steps"])


@pytest.mark.parametrize(("page", "code"), blocks("python"))
def test_python_is_python(page: str, code: str) -> None:
    compile(code, page, "exec")


def test_the_criterion_of_the_guide_works() -> None:
    code = next(code for page, code in blocks("python") if page == "extending.md" and "Criterion" in code)
    scope: dict[str, Any] = {"__name__": "compress.importance.peak"}
    exec(compile(code, "extending.md", "exec"), scope)
    for kind in ("llama_gqa", "phi3", "gpt2"):
        model = tiny_model(kind)
        arch = model_architecture(model)
        criterion = scope["PeakCriterion"](arch)
        criterion.observe(model)
        layer = criterion.scores().layers[0]
        assert layer.channels.shape == (arch.channels,)
        if kind == "llama_gqa":
            mlp: Any = model.get_submodule("model.layers.0.mlp")
            rows = [m.weight.abs().amax(1) for m in (mlp.gate_proj, mlp.up_proj)]
            peaks = [*rows, mlp.down_proj.weight.abs().amax(0)]
            expected = sum(p.double() / p.double().norm() for p in peaks)
            torch.testing.assert_close(layer.channels, expected.detach())
