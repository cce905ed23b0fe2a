"""Fisher information of every decoder matrix, gathered once on calibration text and kept on disk layer by layer."""

from __future__ import annotations

from pathlib import Path

import torch

from compress.model.load import load_model
from compress.pipelines.measure import full_calibration, summed_loss
from compress.pipelines.model_input import ModelInput
from compress.pipelines.settings import QuantizeSettings
from compress.pipelines.stage import Context
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
        arch = model.architecture
        rounds = layer_rounds(arch, LIMIT)
        missing = [layers for layers in rounds if not all(self._file(layer).is_file() for layer in layers)]
        if not missing:
            return
        network = load_model(model.path, dtype=dtype, device=device)
        loss = summed_loss(network)
        windows = full_calibration(context, model.path, source, tokens=settings.calibration_tokens)
        folder.mkdir(exist_ok=True)
        for layers in missing:
            with context.reporter.bar(
                f"Fisher information, layers {layers.start}-{layers.stop - 1}"
            ) as progress:
                found = gather_fisher(
                    network, arch, windows.ids, loss=loss, layers=layers, full=True, progress=progress
                )
            for layer in layers:
                names = [arch.module_name(layer, spec) for spec in arch.linears_at(layer)]
                save_fisher(self._file(layer), {name: found[name] for name in names})

    def layer(self, layer: int) -> dict[str, Fisher]:
        """Module name -> Fisher information of its weight [out, in]."""
        return load_fisher(self._file(layer))

    def _file(self, layer: int) -> Path:
        return self._folder / f"{layer:04d}.safetensors"
