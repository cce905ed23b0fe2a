from __future__ import annotations

from pathlib import Path

import pytest

from compress.errors import UsageError
from compress.pipelines.recipe import apply_shared, read_recipe, run_recipe, shipped
from compress.pipelines.reporter import Reporter
from compress.pipelines.settings import VERBS, Common
from compress.pipelines.stage import Context
from compress.pipelines.workspace import Workspace


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
