"""What of pruning a cluster has a part in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from compress.model.checkpoint import Checkpoint, checkpoint_architecture
from compress.pipelines import prune as pipeline
from compress.pipelines.dispatch import run_verb
from compress.pipelines.prune import NOT_SHARED, shares_work
from compress.pipelines.settings import Common, PruneSettings, resolve
from tests.tiny import tiny_checkpoint


@pytest.mark.parametrize(
    ("given", "wide", "kept", "shared"),
    [
        ({}, False, True, True),
        ({"criterion": "wanda"}, True, True, True),  # the refits
        ({"criterion": "wanda", "shape": "allocated", "repair": "none"}, False, False, True),  # the costs
        ({"criterion": "wanda", "repair": "none"}, False, True, False),
        ({}, True, False, False),  # as of a 7B model
    ],
)
def test_it_is_known_whether_a_cluster_has_work(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    given: dict[str, Any],
    *,
    wide: bool,
    kept: bool,
    shared: bool,
) -> None:
    arch = checkpoint_architecture(Checkpoint(tiny_checkpoint("llama_gqa", tmp_path / "tiny")))
    monkeypatch.setattr("compress.importance.obs.WIDE", 1 if wide else 4096)
    monkeypatch.setattr(pipeline, "fits", lambda *_: kept)
    assert shares_work(resolve(PruneSettings, given, "quick"), arch) == shared


def test_a_cluster_that_gets_no_work_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(tiny_checkpoint("llama_gqa", tmp_path / "tiny"))
    given = {"shape": "semi", "criterion": "magnitude"}
    for engine in ("local", "ray"):
        common = Common(run=tmp_path / engine, model=model, dry_run=True, engine=engine)
        run_verb("prune", common, given)
        found = " ".join("".join(capsys.readouterr()).split())
        assert (NOT_SHARED in found) == (engine == "ray")
