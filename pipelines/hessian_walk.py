"""Input statistics of every decoder matrix, layer by layer, on calibration text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from compress.model.architecture import LinearSpec
from compress.model.layerwise import LayerWalk, gathered_grams
from compress.model.load import load_model
from compress.pipelines.measure import calibration_windows
from compress.pipelines.model_input import ModelInput
from compress.pipelines.settings import QuantizeSettings
from compress.pipelines.stage import Context
from compress.quantize.hessian import InputStatistics, input_statistics

SHARED_INPUT = {
    "q": "attention",
    "k": "attention",
    "v": "attention",
    "qkv": "attention",
    "gate": "mlp",
    "up": "mlp",
}
"""Roles that read the same hidden states, and so have the same statistics."""
BATCH = 4


class HessianWalk:
    """Walks a model with calibration text; each layer's weights may be replaced before the walk goes on.

    Args:
        context: Gives the seed and the reporter.
        model: The model to quantize.
        settings: Give the number of calibration tokens.
        source: Text source; its training split is read.
        device: Where the model runs.
        dtype: In which precision.
    """

    def __init__(
        self,
        context: Context,
        model: ModelInput,
        settings: QuantizeSettings,
        source: str,
        device: str,
        dtype: Any,
    ) -> None:
        self._arch = model.architecture
        self._network = load_model(model.path, dtype=dtype, device=device)
        windows = calibration_windows(context, model.path, source, tokens=settings.calibration_tokens)
        self.protocol = dict(windows.protocol)
        with torch.no_grad():
            self._walk = LayerWalk(self._network, self._arch, windows.ids, batch=min(BATCH, len(windows)))

    @torch.no_grad()
    def statistics(self, layer: int) -> dict[str, InputStatistics]:
        """Module name -> statistics of its inputs, for every linear of ``layer``."""
        first: dict[str, LinearSpec] = {}
        for spec in self._arch.linears_at(layer):
            first.setdefault(SHARED_INPUT.get(spec.role, spec.name), spec)
        with gathered_grams(self._walk.layers[layer], dict.fromkeys(first.values())) as grams:
            self._walk.look(layer)
        found = {name: input_statistics(grams[spec]) for name, spec in first.items()}
        return {
            self._arch.module_name(layer, spec): found[SHARED_INPUT.get(spec.role, spec.name)]
            for spec in self._arch.linears_at(layer)
        }

    @torch.no_grad()
    def advance(self, layer: int, weights: Mapping[str, Tensor] | None = None) -> None:
        """Go on to the next layer, through this one as it is or with the weights given by module name [out, in]."""
        for spec in self._arch.linears_at(layer):
            name = self._arch.module_name(layer, spec)
            if weights is not None and name in weights:
                parameter = self._network.get_parameter(f"{name}.weight")
                parameter.copy_(weights[name].t() if spec.transposed else weights[name])
        self._walk.advance(layer)
