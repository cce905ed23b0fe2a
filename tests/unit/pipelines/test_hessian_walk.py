"""What calibration text tells of matrices: all of the text that was asked for, on the processor that rounds."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compress.errors import CompressError
from compress.model.architecture import LinearSpec
from compress.model.checkpoint import Checkpoint, checkpoint_architecture
from compress.model.load import load_model
from compress.pipelines import hessian_walk
from compress.pipelines.hessian_walk import HessianWalk, sensitivities
from compress.pipelines.measure import calibration_windows
from compress.pipelines.model_input import ModelInput
from compress.pipelines.reporter import Reporter
from compress.pipelines.settings import Common, QuantizeSettings, resolve
from compress.pipelines.stage import Context
from compress.pipelines.way import Way
from compress.pipelines.workspace import Workspace
from tests.tiny import tiny_checkpoint


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelInput:
    checkpoint = Checkpoint(tiny_checkpoint("llama_gqa", tmp_path_factory.mktemp("model") / "tiny"))
    arch = checkpoint_architecture(checkpoint)
    return ModelInput(name="tiny", path=checkpoint.path, id="0", checkpoint=checkpoint, architecture=arch)


def context(folder: Path, source: Path) -> Context:
    common = Common(run=folder / "run", data=str(source), dtype="float32", threads=1)
    return Context(common=common, workspace=Workspace(common.run), reporter=Reporter(quiet=True))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(f"Line {i} of a text that has no other purpose. " * 20 for i in range(60)))
    return path


def walk(model: ModelInput, source: Path, tokens: int, folder: Path) -> HessianWalk:
    settings = resolve(QuantizeSettings, {"calibration_tokens": tokens}, "quick")
    return HessianWalk(context(folder, source), model, settings, str(source), "cpu", torch.float32)


def length(model: ModelInput) -> int:
    return min(512, int(model.checkpoint.config["max_position_embeddings"]))


@pytest.mark.parametrize("windows", [1, 3, 4, 6, 7])
def test_every_window_is_looked_at(windows: int, model: ModelInput, text: Path, tmp_path: Path) -> None:
    tokens = windows * length(model)
    found = walk(model, text, tokens, tmp_path)
    assert found.tokens == tokens
    statistics = found.statistics(0)
    ids = calibration_windows(context(tmp_path, text), model.path, str(text), tokens=tokens).ids
    assert ids.numel() == tokens
    network, seen = load_model(model.path, dtype=torch.float32), []
    name = "model.layers.0.self_attn.q_proj"
    network.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, -2)))
    with torch.no_grad():
        network(ids, use_cache=False)
    gram = seen[0].double().T @ seen[0].double() / tokens
    gram.diagonal().add_(0.01 * gram.diagonal().mean())
    torch.testing.assert_close(statistics[name].gram.double(), gram, rtol=1e-3, atol=1e-5)


class Elsewhere:
    """A matrix on a device that the host's functions cannot read."""

    def __init__(self, gram: Tensor) -> None:
        self._gram = gram

    def __len__(self) -> int:
        return len(self._gram)

    def div_(self, count: int) -> Elsewhere:
        self._gram.div_(count)
        return self

    def cpu(self) -> Tensor:
        return self._gram


def test_moments_of_a_device_come_to_the_host_where_weights_are_rounded(
    model: ModelInput, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = walk(model, text, 1024, tmp_path).statistics(0)
    gathered = hessian_walk.gathered_grams

    @contextmanager
    def far(
        layer: nn.Module, columns: Mapping[LinearSpec, Tensor | None], *, only: bool = False
    ) -> Iterator[dict[LinearSpec, Any]]:
        found: dict[LinearSpec, Any] = {}
        with gathered(layer, columns, only=only) as grams:
            yield found
        found |= {spec: Elsewhere(gram) for spec, gram in grams.items()}

    monkeypatch.setattr(hessian_walk, "gathered_grams", far)
    found = walk(model, text, 1024, tmp_path).statistics(0)
    for name, statistics in expected.items():
        torch.testing.assert_close(found[name].gram, statistics.gram, rtol=0, atol=0)


def test_less_text_than_was_asked_for_is_refused_with_what_there_is(
    model: ModelInput, tmp_path: Path
) -> None:
    short = tmp_path / "short.txt"
    short.write_text("\n\n".join(f"Line {i} of a short text. " * 20 for i in range(12)))
    with pytest.raises(CompressError, match="calibration asks for 1000000 tokens") as refused:
        walk(model, short, 1_000_000, tmp_path)
    given = int(refused.value.remedy.rpartition(" ")[2].rstrip("."))
    assert walk(model, short, given, tmp_path).tokens == given
    settings = resolve(QuantizeSettings, {"calibration_tokens": given + length(model)}, "quick")
    with pytest.raises(CompressError, match=f"asks for {settings.calibration_tokens}"):
        sensitivities(context(tmp_path, short), model, settings, str(short), "cpu", torch.float32)


def test_sensitivities_are_those_of_kept_activations_and_their_layers_run_again(
    model: ModelInput, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = resolve(QuantizeSettings, {"calibration_tokens": 4 * length(model)}, "quick")
    seen: list[bool] = []

    class Watched(Way):
        def open(self, path: Path, **given: Any) -> Any:
            network = super().open(path, **given)
            mlp = network.model.layers[1].mlp
            mlp.register_forward_pre_hook(lambda *_: seen.append(torch.is_grad_enabled()))
            return network

    def found() -> dict[str, Tensor]:
        own = context(tmp_path, text)
        return sensitivities(own, model, settings, str(text), "cpu", torch.float32, Watched())[0]

    again, passes = found(), sum(seen)
    seen.clear()
    monkeypatch.setattr(hessian_walk, "recomputing", lambda *_, **__: nullcontext())
    kept = found()
    assert kept.keys() == again.keys()
    assert all(torch.equal(kept[name], again[name]) for name in kept)
    assert passes == 2 * sum(seen) > 0


def test_conversations_are_read_without_padding(model: ModelInput, tmp_path: Path) -> None:
    talk = tmp_path / "talk.jsonl"
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"number {i}"},
                {"role": "assistant", "content": "one two"},
            ]
        }
        for i in range(900)
    ]
    talk.write_text("\n".join(json.dumps(row) for row in rows))
    windows = calibration_windows(context(tmp_path, talk), model.path, str(talk), tokens=4 * length(model))
    assert len(windows) == 4
    assert windows.protocol["layout"] == "stream"
    runs = [len({*row[-8:].tolist()}) for row in windows.ids]
    assert min(runs) > 1  # padding would end a window with one token over and over
