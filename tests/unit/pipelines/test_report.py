from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from compress.__main__ import app
from compress.errors import CompressError, UsageError
from compress.pipelines.dispatch import run_verb
from compress.pipelines.identity import stage_id
from compress.pipelines.report import report
from compress.pipelines.reporter import Reporter
from compress.pipelines.settings import DEFAULT_RUN, Common
from compress.pipelines.stage import Context
from compress.pipelines.workspace import Workspace
from tests.unit.report.samples import sample_curve, sample_run


def chain(root: Path, *, name: str = "some model") -> Workspace:
    """A chain of one stage, of which only the record is there."""
    workspace = Workspace(root)
    workspace.set_model({"name": name, "path": "/nowhere", "fingerprint": "f0"})
    record = sample_run(layers=2)["stages"][0]
    partial = workspace.open_partial("prune", record["config"], {"model": "f0"}, redo=False)
    workspace.complete(partial, record | {"id": stage_id("prune", record["config"], {"model": "f0"})})
    return workspace


@pytest.fixture
def context(tmp_path: Path) -> Context:
    workspace = chain(tmp_path / "run")
    return Context(common=Common(run=tmp_path / "run"), workspace=workspace, reporter=Reporter(quiet=True))


def written(run: Path, *path: Path, **given: Any) -> Path:
    """The page of ``compress report``, as the command line asks for it."""
    return Path(run_verb("report", Common(run=run), {"path": list(path), **given}, quiet=True)["report"])


def test_results_of_a_benchmark_in_the_workspace_are_drawn(context: Context) -> None:
    plain = report(context).read_text()
    assert "some model" in plain
    assert "Pruning methods compared" not in plain
    results = context.workspace.root / "pruning.json"
    results.write_text(json.dumps({"format_version": 1, "identity": {}, "rows": sample_curve()}))
    page = report(context).read_text()
    assert "Pruning methods compared" in page
    assert "obs + refit" in page
    results.write_text("[")
    with pytest.raises(CompressError, match=r"pruning\.json cannot be read"):
        report(context)


def test_several_runs_are_compared(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        chain(tmp_path / name)
    alone = written(tmp_path / "a")
    assert alone == tmp_path / "a" / "report.html"
    assert "Runs compared" not in alone.read_text()
    # The run itself and repetitions are compared once.
    paths = [tmp_path / "b", tmp_path / "a", tmp_path / "c", tmp_path / "b" / ".." / "b"]
    page = written(tmp_path / "a", *paths, output=tmp_path / "page.html")
    told = page.read_text()
    assert "Runs compared" in told
    rows = [told.count(f'<th scope="row">{name}</th>') for name in "abc"]
    assert rows == [1, 1, 1]
    assert told.index('<th scope="row">a</th>') < told.index('<th scope="row">b</th>')
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c", "page.html"]
    assert not (tmp_path / "b" / "report.html").exists()


def test_the_command_line_takes_other_runs(tmp_path: Path) -> None:
    for name in ("a", "b"):
        chain(tmp_path / name)
    call = ["report", str(tmp_path / "b"), "--run", str(tmp_path / "a"), "--json"]
    done = CliRunner().invoke(app, call)
    assert done.exit_code == 0
    assert json.loads(done.output) == {"report": str(tmp_path / "a" / "report.html")}
    assert "Runs compared" in (tmp_path / "a" / "report.html").read_text()
    done = CliRunner().invoke(app, ["report", str(tmp_path / "none"), "--run", str(tmp_path / "a")])
    assert done.exit_code == 2


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
        chain(tmp_path / name / "run")
    told = written(tmp_path / "x" / "run", tmp_path / "y" / "run").read_text()
    assert f'<th scope="row">{tmp_path / "y" / "run"}</th>' in told


def test_without_a_chain_in_the_default_folder_the_first_path_has_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chain(tmp_path / "a")
    chain(tmp_path / "b")
    monkeypatch.chdir(tmp_path)
    assert written(DEFAULT_RUN, Path("a"), Path("b")).resolve() == tmp_path / "a" / "report.html"
    assert not DEFAULT_RUN.exists()


def test_what_is_no_chain_is_refused_and_left_alone(tmp_path: Path) -> None:
    chain(tmp_path / "a")
    (tmp_path / "empty").mkdir()
    for run, path in (("a", "missing"), ("a", "empty"), ("missing", "a")):
        with pytest.raises(UsageError, match=r"There is no chain in .*(missing|empty)"):
            written(tmp_path / run, tmp_path / path)
    with pytest.raises(UsageError, match="nothing to report"):
        written(tmp_path / "missing")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "empty"]
    assert not any((tmp_path / "empty").iterdir())
    assert not (tmp_path / "a" / "report.html").exists()


def test_a_model_in_a_folder_is_called_by_its_name(tmp_path: Path) -> None:
    chain(tmp_path / "run", name=str(tmp_path / "my-llama"))
    assert "<h1>my-llama</h1>" in written(tmp_path / "run").read_text()


def test_a_page_that_cannot_be_written_leaves_the_old_one(
    context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = report(context)
    before = page.read_text()

    def full(self: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(CompressError, match=r"cannot be written to .*report\.html \(No space left"):
        report(context)
    assert page.read_text() == before
    assert [path.name for path in page.parent.iterdir() if path.suffix == ".tmp"] == []
