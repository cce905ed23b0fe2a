"""The benchmark of merging: it runs to its end on a tiny model, and a wrong matrix ends it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from compress.adapters.merge import merge_adapter
from compress.benchmarks import merging
from compress.benchmarks.scale_model import write_random_adapter, write_random_model
from compress.errors import CompressError
from compress.model.checkpoint import Checkpoint
from tests.unit.benchmarks.test_scale import TINY


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_one_merge_is_measured_and_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_random_adapter(tmp_path / "adapter", write_random_model(tmp_path / "full", TINY))
    assert merging.main(["--one", "--work", str(tmp_path)]) == 0
    row = json.loads(capsys.readouterr().out)
    assert row["seconds"] > 0
    assert row["peak_bytes"] > 0
    assert not (tmp_path / "merged").exists()


@pytest.mark.slow
def test_the_quick_form_prints_and_writes_its_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(merging.SHAPES, "small", TINY)  # type: ignore[arg-type]
    out = tmp_path / "found.json"
    given = ["--quick", "--rounds", "1", "--work", str(tmp_path), "--out", str(out)]
    assert merging.main(given) == 0
    row = json.loads(out.read_text(encoding="utf-8"))["rows"]["merge"]
    assert row["weight_bytes"] == Checkpoint(tmp_path / "full").bytes
    assert row["peak_bytes"] > 0
    assert len(row["all_seconds"]) == 1
    assert "of weights on cpu" in capsys.readouterr().out
    assert not (tmp_path / "merged").exists()


def test_a_wrong_matrix_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = Checkpoint(write_random_model(tmp_path / "full", TINY))
    adapter = write_random_adapter(tmp_path / "adapter", full.path, rank=2)
    merged = Checkpoint(merge_adapter(full, adapter, tmp_path / "merged"))
    merging.check(full, adapter, merged, exact=True)
    for exact in (True, False):
        with pytest.raises(CompressError, match=r"is not W \+ s B A"):
            merging.check(full, adapter, full, exact=exact)
