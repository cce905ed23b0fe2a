from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from compress.errors import UsageError
from compress.pipelines import dispatch
from compress.pipelines.recipe import apply_shared, read_recipe, run_recipe, shipped
from compress.pipelines.reporter import Reporter
from compress.pipelines.settings import VERBS, Common
from compress.pipelines.stage import Context, Outcome
from compress.pipelines.workspace import Stage, Workspace


def write(tmp_path: Path, text: str) -> str:
    (tmp_path / "mine.yaml").write_text(text, encoding="utf-8")
    return str(tmp_path / "mine.yaml")


def test_a_recipe_is_read_in_order(tmp_path: Path) -> None:
    recipe = read_recipe(
        write(tmp_path, "seed: 3\nsteps:\n  - prune: {ratio: 0.4}\n  - train\n  - recover:\n  - report\n")
    )
    assert recipe.name == "mine"
    assert recipe.shared == {"seed": 3}
    assert list(recipe.steps) == [("prune", {"ratio": 0.4}), ("train", {}), ("recover", {}), ("report", {})]


def test_shared_options_fill_what_the_command_line_left(tmp_path: Path) -> None:
    recipe = read_recipe(write(tmp_path, "seed: '3'\ndtype: float32\nmodel:\nsteps: [prune]\n"))
    common = apply_shared(recipe, Common(seed=5))
    assert (common.seed, common.dtype, common.model) == (5, "float32", None)
    assert apply_shared(recipe, Common()).seed == 3


def test_a_step_may_read_a_text_of_its_own(tmp_path: Path) -> None:
    text = "data: c4\nsteps: [prune: {data: pydoc, ratio: 0.4}, align: {data: 3}, train: {data: }, eval]"
    recipe = read_recipe(write(tmp_path, text))
    assert recipe.texts == {"prune": "pydoc", "align": "3"}
    assert list(recipe.steps) == [("prune", {"ratio": 0.4}), ("align", {}), ("train", {}), ("eval", {})]
    assert recipe.shared == {"data": "c4"}


def test_the_text_of_a_step_is_read_by_it_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the command line names another: that takes the place of the shared one."""
    read: list[tuple[str, str | None, Any]] = []

    def stage(context: Context, verb: str, given: Mapping[str, Any]) -> Outcome:
        read.append((verb, context.common.data, dict(given)))
        made = Stage(path=tmp_path / verb, record={"verb": verb})
        return Outcome(stage=made, fresh=True)

    monkeypatch.setattr(dispatch, "run_stage_verb", stage)
    text = "[prune: {data: c4}, align: {data: wikitext2, steps: 3}, train, eval: {data: a.txt}, recover]"
    recipe = read_recipe(write(tmp_path, f"data: pydoc\nsteps: {text}"))
    for given, shared in ((None, "pydoc"), ("mine.jsonl", "mine.jsonl")):
        common = apply_shared(recipe, Common(run=tmp_path / "run", effort="quick", data=given))
        context = Context(common=common, workspace=Workspace(tmp_path / "run"), reporter=Reporter(quiet=True))
        read.clear()
        run_recipe(context, recipe)
        assert read == [
            ("prune", "c4", {}),
            ("align", "wikitext2", {"steps": 3}),
            ("train", shared, {}),
            ("eval", "a.txt", {}),
            ("recover", shared, {}),
        ]


@pytest.mark.parametrize("name", ["loram", "qloram"])
def test_loram_aligns_on_one_text_and_trains_on_another(name: str) -> None:
    recipe = read_recipe(name)
    assert set(recipe.texts) == {"prune", "align"}
    assert apply_shared(recipe, Common(data="mine.jsonl")).data == "mine.jsonl"


@pytest.mark.parametrize("name", shipped())
def test_shipped_recipes_are_whole(name: str) -> None:
    assert {verb for verb, _ in read_recipe(name).steps} <= {*VERBS, "report"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no list of steps"),
        ("[prune]", "no list of steps"),
        ("steps: []", "no list of steps"),
        ("steps: prune", "no list of steps"),
        ("steps: [prune\n", r"is not YAML \(line 2\)"),
        ("steps: [&a [*a]]", "no verb"),
        ("steps: [{prune: {}, train: {}}]", "no verb"),
        ("steps: [{1: {}}]", "no verb"),
        ("steps: [eval, eval]", "eval twice"),
        ("steps: [{prune: 3}]", "are no mapping"),
        ("steps: [{report: {data: c4}}]", "no setting 'data'"),
        ("steps: [{recover: {data: c4}}]", "recover of .* reads no text"),
        ("steps: [{recover: {data: }}]", "recover of .* reads no text"),
        ("steps: [{train: {data: [c4]}}]", "data cannot be"),
        ("steps: [{train: {seed: 3}}]", "no setting 'seed'"),
        ("steps: [{train: {model: x}}]", "no setting 'model'"),
        ("steps: [{report: {page: x}}]", "no setting 'page'"),
        ("steps: [{prune: {ratoi: 0.5}}]", "Did you mean 'ratio'"),
        ("steps: [{quantize: {budget: [3]}}]", "budget cannot be"),
        ("steps: [{train: {method: dora}}]", "no method 'dora'"),
        ("seed: soon\nsteps: [prune]", "seed cannot be 'soon'"),
        ("run: here\nsteps: [prune]", "no setting 'run'"),
        ("steps: [!!python/object/apply:os.system ['true']]", r"is not YAML \(line 1\)"),
        ("steps: [2001-99-99]", "YAML has no such type"),
        ("steps: [!!bool maybe]", "YAML has no such type"),
    ],
)
def test_what_is_no_recipe(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        read_recipe(write(tmp_path, text))


def test_a_file_that_is_no_text_and_a_file_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="UTF-8"):
        read_recipe(str(tmp_path / "binary.yaml"))
    with pytest.raises(UsageError, match=r"no recipe .*one of: chain"):
        read_recipe(str(tmp_path / "absent.yaml"))


def test_a_dry_run_of_a_report_writes_no_page(tmp_path: Path) -> None:
    context = Context(
        common=Common(run=tmp_path / "run", effort="quick", dry_run=True),
        workspace=Workspace(tmp_path / "run"),
        reporter=Reporter(quiet=True),
    )
    result = run_recipe(context, read_recipe(write(tmp_path, "steps: [report]")))
    assert result == {"recipe": "mine", "stages": [{"verb": "report"}]}
    assert not (tmp_path / "run").exists()
