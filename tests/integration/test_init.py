"""``compress init``: recipes that run as they are, and with every option in them uncommented."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from hypothesis import given
from hypothesis import strategies as st

from compress.__main__ import app
from compress.pipelines.recipe import READERS, read_recipe
from compress.pipelines.recipe_text import scalar
from compress.pipelines.setting_values import EFFORTS
from compress.pipelines.settings import VERBS, resolve
from tests.commands import cli
from tests.tiny import tiny_checkpoint

KINDS = ("llama_gqa", "llama_mqa", "llama_tied", "mistral", "qwen3", "gemma2", "gemma3_text", "phi3", "gpt2")
OPTION = re.compile(r"^( *)# ([a-z_0-9]+):(?= |$)", re.MULTILINE)
STEPS = ["prune", "quantize", "train", "recover", "eval", "report"]


@pytest.fixture(autouse=True)
def _plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COMPRESS_RUN", raising=False)
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("NO_COLOR", "1")


def written(model: Path, *more: str | Path, out: Path) -> str:
    ran = cli("init", model, "--out", out, *more)
    assert ran.code == 0, ran.err
    return out.read_text(encoding="utf-8")


def uncommented(text: str) -> str:
    """Every option without its comment sign; all that is left of comments are meanings and the head."""
    body = text.index("\n\n")
    return text[:body] + OPTION.sub(r"\1\2:", text[body:])


@pytest.mark.parametrize("kind", KINDS)
def test_it_runs_as_it_is_and_with_every_option_uncommented(
    kind: str, tmp_path: Path, text_file: Path
) -> None:
    model = tiny_checkpoint(kind, tmp_path / "model")
    recipe = tmp_path / "recipe.yaml"
    text = written(model, out=recipe)
    run = ("--run", tmp_path / "run", "--data", text_file, "--dry-run", "--json")
    ran = cli("run", recipe, *run)
    assert ran.code == 0, ran.err
    stages = json.loads(ran.out)["stages"]
    assert [stage["verb"] for stage in stages] == STEPS
    recipe.write_text(uncommented(text), encoding="utf-8")
    again = cli("run", recipe, *run)
    assert again.code == 0, again.err
    assert json.loads(again.out)["stages"] == stages
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "recipe.yaml"]


@pytest.mark.parametrize("effort", EFFORTS)
def test_every_option_is_there_with_the_default_of_its_effort(effort: str, tmp_path: Path) -> None:
    model = tiny_checkpoint("llama_gqa", tmp_path / "model")
    text = written(model, "--effort", effort, out=tmp_path / "recipe.yaml")
    data = yaml.safe_load(uncommented(text))
    assert {key for key in data if key != "steps"} == {"model", "data", "effort", "seed", "dtype", "device"}
    assert data["effort"] == effort
    steps = {k: v for step in data["steps"] if isinstance(step, dict) for k, v in step.items()}
    assert [*steps, data["steps"][-1]] == STEPS
    for verb, settings in steps.items():
        if verb != "recover":
            assert settings.pop("data") is None
        assert set(settings) == {field.name for field in dataclasses.fields(VERBS[verb])}
        chosen = {"prune": {"ratio": 0.5}}.get(verb, {})
        defaults = dataclasses.asdict(resolve(VERBS[verb], chosen, effort))
        if defaults.get("sequence", 0) > 256:  # what the tiny model reads at once
            defaults["sequence"] = 256
        assert dataclasses.asdict(resolve(VERBS[verb], settings, effort)) == defaults


def test_meanings_are_those_of_the_help(tmp_path: Path) -> None:
    text = written(tiny_checkpoint("llama_gqa", tmp_path / "model"), out=tmp_path / "recipe.yaml")
    group: Any = typer.main.get_command(app)
    found: dict[tuple[str, str], str] = {}
    verb, meaning = "run", ""
    for line in text[text.index("\n\n") :].splitlines():
        words = line.strip()
        if step := re.match(r"  - (\w+):?$", line):
            verb = step.group(1)
        elif words.startswith("## "):
            meaning = f"{meaning} {words.removeprefix('## ')}".strip()
        elif option := re.match(r"(?:# )?(\w+):", words):
            found[verb, option.group(1)], meaning = meaning, ""
    del found["run", "steps"]
    assert len(found) > 60
    own = [found.pop((verb, "data")) for verb in READERS if (verb, "data") in found]
    assert own == ["For this step alone; the shared text where it is left out."] * 4
    for (verb, name), said in found.items():
        (parameter,) = (p for p in group.commands[verb].params if p.name == name)
        assert said == " ".join(parameter.help.split()), f"{verb} {name}"
        assert said


def test_what_was_given_stands_in_the_recipe(tmp_path: Path, text_file: Path) -> None:
    model = tiny_checkpoint("llama_gqa", tmp_path / "a model: #1")
    recipe = tmp_path / "recipe.yaml"
    written(model, "--data", text_file, "--seed", "7", "--dtype", "float32", out=recipe)
    assert read_recipe(str(recipe)).shared == {
        "model": str(model),
        "data": str(text_file),
        "effort": "quick",
        "seed": 7,
        "dtype": "float32",
    }


def test_the_head_knows_the_model(tmp_path: Path) -> None:
    text = written(tiny_checkpoint("llama_gqa", tmp_path / "model"), out=tmp_path / "recipe.yaml")
    head = " ".join(line.removeprefix("# ") for line in text.split("\n\n")[0].splitlines())
    assert "llama, 2 layers of width 64, 8 heads in 4 KV groups of 8 wide, 96 MLP channels" in head
    # Embedding and output matrix, five norms, and in each of two layers q, o, then k, v, then the MLP.
    parameters = 2 * 128 * 64 + 5 * 64 + 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 96 * 64)
    assert f"{parameters / 1000:.1f} k parameters" in head


def test_a_model_that_does_not_fit_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_checkpoint("llama_gqa", tmp_path / "model")
    monkeypatch.setattr("compress.machine.container_limit", lambda: 100_000)
    ran = cli("init", model, "--out", tmp_path / "recipe.yaml", "--json")
    assert ran.code == 0
    found = json.loads(ran.out)
    assert found["fits"] is False
    head = " ".join(found["recipe"].replace("\n#", "").split())
    assert "recover read such a model layer by layer (--memory-limit" in head
    assert "eval hold their models whole" in head


def test_a_file_is_replaced_only_when_asked(tmp_path: Path) -> None:
    model = tiny_checkpoint("llama_gqa", tmp_path / "model")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("mine")
    ran = cli("init", model, "--out", recipe)
    assert (ran.code, recipe.read_text()) == (2, "mine")
    assert "exists" in ran.complaint[0]
    assert "--force" in ran.complaint[1]
    assert cli("init", model, "--out", recipe, "--force").code == 0
    assert read_recipe(str(recipe)).steps
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "recipe.yaml"]


def test_standard_output_gets_the_recipe_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_checkpoint("llama_gqa", tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    ran = cli("init", model, "--out", "-")
    assert (ran.code, ran.err) == (0, "")
    assert [next(iter(s)) if isinstance(s, dict) else s for s in yaml.safe_load(ran.out)["steps"]] == STEPS
    assert json.loads(cli("init", model, "--out", "-", "--json").out)["recipe"] == ran.out
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_refusals_leave_nothing(tmp_path: Path) -> None:
    model = tiny_checkpoint("llama_gqa", tmp_path / "model")
    experts = tiny_checkpoint("mixtral", tmp_path / "experts")
    out = tmp_path / "recipe.yaml"
    for arguments, code, cause in (
        ((model, "--out", tmp_path / "no" / "recipe.yaml"), 2, "cannot be written"),
        ((model, "--out", tmp_path), 2, "cannot be written"),
        ((tmp_path / "modle", "--out", out), 1, "There is no model"),
        ((experts, "--out", out), 1, "expert"),
        ((model, "--out", out, "--device", "cuda:99"), 2, "no CUDA device"),
        ((model, "--out", out, "--effort", "heroic"), 2, "no effort"),
    ):
        ran = cli("init", *arguments)
        assert ran.code == code, ran.err
        assert cause in ran.complaint[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["experts", "model"]


@given(
    st.one_of(
        st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1),
        st.integers(-(10**6), 10**6),
        st.floats(allow_nan=False, allow_infinity=False),
        st.booleans(),
        st.sampled_from(["4:8", "none", "null", "yes", "1e-3", "0x10", "- a", "a: b", "a #b", "~", ""]),
    )
)
def test_values_are_read_back(value: Any) -> None:
    line = f"name: {scalar(value)}"
    assert "\n" not in line
    read = yaml.safe_load(line)["name"]
    assert (read, type(read)) == (value, type(value))
