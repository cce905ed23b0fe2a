"""The room that a stage needs: what it writes at its peak, less what an interrupted run has left."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from compress.errors import CompressError
from compress.model.checkpoint import Checkpoint, checkpoint_architecture
from compress.pipelines.disk import RECORDS, quantize_disk, recover_disk, require_space, thin_disk, train_disk
from compress.pipelines.model_input import ModelInput
from compress.pipelines.settings import QuantizeSettings, TrainSettings, resolve
from tests.tiny import tiny_checkpoint


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelInput:
    path = tiny_checkpoint("llama_gqa", tmp_path_factory.mktemp("disk") / "model")
    checkpoint = Checkpoint(path)
    return ModelInput(
        name="m", path=path, id="", checkpoint=checkpoint, architecture=checkpoint_architecture(checkpoint)
    )


def test_what_lies_there_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    partial = tmp_path / "01-prune.partial"
    (partial / "layers").mkdir(parents=True)
    require_space(tmp_path, "prune", 1000, partial)
    with pytest.raises(CompressError, match=r"prune needs 1\.5 kB on the disk of .*, and 1\.0 kB are free"):
        require_space(tmp_path, "prune", 1500, partial)
    (partial / "layers" / "0000").write_bytes(bytes(600))
    require_space(tmp_path, "prune", 1500, partial)


def test_a_model_is_counted_with_the_shard_that_lies_there_twice(model: ModelInput) -> None:
    file = (model.path / "model.safetensors").stat().st_size
    side = sum(
        f.stat().st_size for f in model.path.iterdir() if f.name not in ("model.safetensors", "config.json")
    )
    masks = 2 * model.architecture.decoder_linear_parameters() / 8
    assert thin_disk(model) == pytest.approx(2 * file + masks + side + RECORDS, abs=200)


def test_quantize_counts_its_layers_beside_the_result(model: ModelInput) -> None:
    settings = resolve(QuantizeSettings, {"budget": "4bit", "objective": "frobenius"}, "quick")
    linears = model.architecture.decoder_linear_parameters()
    kept = model.checkpoint.bytes - 4 * linears
    found = quantize_disk(model, settings, torch.float32, "quick")
    assert found > linears * 4 / 8 + 2 * (kept + linears * 4 / 8)
    fisher = resolve(QuantizeSettings, {"budget": "4bit", "objective": "fisher"}, "quick")
    assert quantize_disk(model, fisher, torch.float32, "quick") == found + 4 * linears


def test_train_counts_its_states(model: ModelInput) -> None:
    small, large = (
        train_disk(model, resolve(TrainSettings, {"rank": rank}, "quick"), torch.float32, "quick")
        for rank in (4, 8)
    )
    assert large - RECORDS == 2 * (small - RECORDS) > 0


def test_merging_counts_a_model(model: ModelInput, tmp_path: Path) -> None:
    with pytest.raises(CompressError, match="is not an adapter"):
        recover_disk(model, tmp_path, merge=True)
