"""Fisher information on disk: against squared gradients of one example at a time, and gathered only once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from compress.model.checkpoint import Checkpoint, checkpoint_architecture
from compress.model.load import load_model
from compress.pipelines import fisher_files
from compress.pipelines.fisher_files import FisherFiles
from compress.pipelines.matrices import matrices_of
from compress.pipelines.measure import calibration_windows
from compress.pipelines.model_input import ModelInput
from compress.pipelines.reporter import Reporter
from compress.pipelines.settings import Common, QuantizeSettings, resolve
from compress.pipelines.stage import Context
from compress.pipelines.workspace import Workspace
from compress.quantize.fisher import Fisher
from tests.tiny import tiny_checkpoint

TOKENS = 1024


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelInput:
    checkpoint = Checkpoint(tiny_checkpoint("llama_gqa", tmp_path_factory.mktemp("model") / "tiny"))
    arch = checkpoint_architecture(checkpoint)
    return ModelInput(name="tiny", path=checkpoint.path, id="0", checkpoint=checkpoint, architecture=arch)


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> Context:
    folder = tmp_path_factory.mktemp("run")
    text = folder / "text.txt"
    text.write_text("\n\n".join(f"Line {i} of a text that has no other purpose. " * 20 for i in range(60)))
    common = Common(run=folder / "run", data=str(text), dtype="float32", threads=1)
    return Context(common=common, workspace=Workspace(common.run), reporter=Reporter(quiet=True))


def gathered(context: Context, model: ModelInput, folder: Path) -> FisherFiles:
    settings = resolve(QuantizeSettings, {"calibration_tokens": TOKENS, "objective": "fisher"}, "quick")
    return FisherFiles(context, model, settings, str(context.common.data), "cpu", torch.float32, folder)


def test_it_is_the_sum_of_squared_gradients_of_single_windows(
    model: ModelInput, context: Context, tmp_path: Path
) -> None:
    files = gathered(context, model, tmp_path / "fisher")
    network = load_model(model.path, dtype=torch.float32)
    windows = calibration_windows(context, model.path, str(context.common.data), tokens=TOKENS)
    assert len(windows) >= 2
    sums: dict[str, torch.Tensor] = {}
    for ids in windows.ids:
        network.zero_grad()
        logits = network(ids[None], use_cache=False).logits[0, :-1]
        torch.nn.functional.cross_entropy(logits, ids[1:], reduction="sum").backward()
        for matrix in matrices_of(model):
            gradient = network.get_parameter(f"{matrix.module}.weight").grad
            assert gradient is not None
            sums[matrix.module] = sums.get(matrix.module, torch.zeros(())) + gradient.double().square()
    for layer in range(model.architecture.layers):
        found = files.layer(layer)
        assert set(found) == {m.module for m in matrices_of(model) if m.layer == layer}
        for name, fisher in found.items():
            assert fisher.full is not None
            assert fisher.examples == len(windows)
            torch.testing.assert_close(fisher.full.double(), sums[name], rtol=1e-3, atol=1e-9)


def test_rounds_of_layers_give_the_same_and_are_gathered_once(
    model: ModelInput, context: Context, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = gathered(context, model, tmp_path / "whole")
    monkeypatch.setattr(fisher_files, "LIMIT", 1)
    layers: list[range] = []
    gather = fisher_files.gather_fisher

    def counted(*args: Any, **given: Any) -> dict[str, Fisher]:
        layers.append(given["layers"])
        return gather(*args, **given)

    monkeypatch.setattr(fisher_files, "gather_fisher", counted)
    parts = gathered(context, model, tmp_path / "parts")
    assert layers == [range(0, 1), range(1, 2)]
    for layer in range(2):
        for name, fisher in whole.layer(layer).items():
            other = parts.layer(layer)[name]
            assert fisher.full is not None
            assert other.full is not None
            torch.testing.assert_close(other.full, fisher.full, rtol=1e-4, atol=0)
    gathered(context, model, tmp_path / "parts")
    assert len(layers) == 2
    (tmp_path / "parts" / "0001.safetensors").unlink()
    gathered(context, model, tmp_path / "parts")
    assert layers[2:] == [range(1, 2)]
