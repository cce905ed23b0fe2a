"""Fisher information of every decoder matrix, gathered once on calibration text and kept on disk layer by layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from compress.data.windows import Windows
from compress.model.load import load_model
from compress.pipelines.measure import full_calibration, summed_loss, windows_record
from compress.pipelines.model_input import ModelInput
from compress.pipelines.settings import QuantizeSettings
from compress.pipelines.stage import Context
from compress.pipelines.workspace import read_json, write_json
from compress.quantize.fisher import Fisher, load_fisher, save_fisher
from compress.quantize.fisher_collect import gather_fisher, layer_rounds

LIMIT = 4 << 30
"""Bytes of whole Fisher matrices in memory at once; of a model with more, several rounds read the text."""


class FisherFiles:
    """One file a layer in ``folder``; what an interrupted run has gathered is used again.

    Args:
        context: Gives the seed and the reporter.
        model: The model to quantize.
        settings: Give the number of calibration tokens; every window of them is one example.
        source: Text source; its training split is read.
        device: Where the model runs.
        dtype: In which precision.
        folder: Where the files are.
    """

    def __init__(
        self,
        context: Context,
        model: ModelInput,
        settings: QuantizeSettings,
        source: str,
        device: str,
        dtype: torch.dtype,
        folder: Path,
    ) -> None:
        self._folder = folder
        rounds = layer_rounds(model.architecture, LIMIT)
        missing = [layers for layers in rounds if not all(self._file(layer).is_file() for layer in layers)]
        if not missing:
            return
        windows = full_calibration(context, model.path, source, tokens=settings.calibration_tokens)
        folder.mkdir(exist_ok=True)
        record = windows_record(windows)
        for layer, found in fisher_layers(context, model, windows, device, dtype, missing):
            write_json(self._record, record)  # not before there is something to go on from
            save_fisher(self._file(layer), found)

    @property
    def calibration(self) -> dict[str, Any] | None:
        """What a stage records of the windows; None where a version that kept no such record gathered all of it."""
        return read_json(self._record) if self._record.is_file() else None

    @property
    def _record(self) -> Path:
        return self._folder / "calibration.json"

    def layer(self, layer: int) -> dict[str, Fisher]:
        """Module name -> Fisher information of its weight [out, in]."""
        return load_fisher(self._file(layer))

    def _file(self, layer: int) -> Path:
        return self._folder / f"{layer:04d}.safetensors"


def fisher_layers(
    context: Context,
    model: ModelInput,
    windows: Windows,
    device: str,
    dtype: torch.dtype,
    rounds: Sequence[range],
) -> Iterator[tuple[int, dict[str, Fisher]]]:
    """Each layer of some rounds with the Fisher information of its matrices by module name.

    Args:
        context: Gives the reporter.
        model: The model.
        windows: Each is one example.
        device: Where the model runs.
        dtype: In which precision.
        rounds: Layers that are gathered at once; each round reads all of the windows.
    """
    arch, network = model.architecture, load_model(model.path, dtype=dtype, device=device)
    loss = summed_loss(network)
    for layers in rounds:
        label = f"Fisher information, layers {layers.start}-{layers.stop - 1}"
        with context.reporter.bar(label) as progress:
            found = gather_fisher(
                network, arch, windows.ids, loss=loss, layers=layers, full=True, progress=progress
            )
        for layer in layers:
            names = [arch.module_name(layer, spec) for spec in arch.linears_at(layer)]
            yield layer, {name: found.pop(name) for name in names}
