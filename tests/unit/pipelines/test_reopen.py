from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from compress.errors import CompressError
from compress.model.load import load_model
from compress.pipelines.reopen import RECORD, check_ids, check_reopens, record_logits
from tests.tiny import tiny_checkpoint


@pytest.fixture
def recorded(tmp_path: Path) -> Path:
    folder = tiny_checkpoint("llama_gqa", tmp_path / "model")
    record_logits(load_model(folder), check_ids(128, 0), folder)
    return folder


def test_a_real_process_reopens_it_whatever_lies_in_the_current_folder(
    recorded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "torch.py").write_text("raise SystemExit('not torch')")
    monkeypatch.chdir(tmp_path)
    assert check_reopens(recorded) < 1e-6


@pytest.mark.usefixtures("forked_reopen")
def test_other_logits_are_noticed(recorded: Path) -> None:
    record = load_file(recorded / RECORD)
    record["logits"] = record["logits"] * 1.001
    save_file(record, recorded / RECORD)
    with pytest.raises(CompressError, match="other logits"):
        check_reopens(recorded)


@pytest.mark.usefixtures("forked_reopen")
def test_logits_that_are_no_numbers_are_noticed(recorded: Path) -> None:
    record = load_file(recorded / RECORD)
    record["logits"] = torch.full_like(record["logits"], float("nan"))
    save_file(record, recorded / RECORD)
    with pytest.raises(CompressError, match="other logits"):
        check_reopens(recorded)


@pytest.mark.usefixtures("forked_reopen")
def test_a_model_that_does_not_open_is_noticed(recorded: Path) -> None:
    (recorded / "config.json").write_text("{}")
    with pytest.raises(CompressError, match="does not open in a fresh process"):
        check_reopens(recorded)


def test_the_tokens_of_the_check_are_those_of_the_seed() -> None:
    assert torch.equal(check_ids(128, 3), check_ids(128, 3))
    assert not torch.equal(check_ids(128, 3), check_ids(128, 4))
    assert check_ids(128, 3).max() < 128
