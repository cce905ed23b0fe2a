from __future__ import annotations

import json
from pathlib import Path

import pytest

from compress.errors import CompressError
from compress.pipelines.report import report
from compress.pipelines.reporter import Reporter
from compress.pipelines.settings import Common
from compress.pipelines.stage import Context
from compress.pipelines.workspace import Workspace, stage_id
from tests.unit.report.samples import sample_curve, sample_run


@pytest.fixture
def context(tmp_path: Path) -> Context:
    """A chain of one stage, of which only the record is there."""
    workspace = Workspace(tmp_path / "run")
    workspace.set_model({"name": "some model", "path": "/nowhere", "fingerprint": "f0"})
    record = sample_run(layers=2)["stages"][0]
    partial = workspace.open_partial("prune", record["config"], {"model": "f0"}, redo=False)
    workspace.complete(partial, record | {"id": stage_id("prune", record["config"], {"model": "f0"})})
    return Context(common=Common(run=tmp_path / "run"), workspace=workspace, reporter=Reporter(quiet=True))


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
