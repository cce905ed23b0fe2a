"""What calibration text tells of every decoder matrix: its inputs, layer by layer, and what the loss minds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from compress.engine import LocalEngine
from compress.model.architecture import LinearSpec
from compress.model.layerwise import LayerWalk, gathered_grams
from compress.model.recompute import recomputing
from compress.model.resident import resident
from compress.pipelines.matrices import SHARED_INPUT, VOCABULARY
from compress.pipelines.measure import full_calibration, summed_loss, windows_record
from compress.pipelines.model_input import ModelInput
from compress.pipelines.settings import QuantizeSettings
from compress.pipelines.stage import Context
from compress.pipelines.vocabulary import vocabulary_moments
from compress.pipelines.way import WHOLE, Way
from compress.quantize.hessian import InputStatistics, input_statistics
from compress.quantize.sensitivity import output_sensitivities
from compress.quantize.vocabulary import MatrixMoments

BATCH = 4
"""At most so many windows run at once."""
GRADIENT_BATCH = 1
GRADIENT_SHARE, GRADIENT_TOKENS = 0.5, 4096
"""Share of the calibration windows that go through the backward pass, and at most how many tokens: with 8,192 of them
the predicted cost of the choice was up to 0.1 % lower, on five layers of the embedded model at four budgets."""
NO_MOMENTS: Mapping[str, MatrixMoments] = {}
TABLE_TOKENS = 8192
"""Calibration tokens that predictions are made from; what is rounded in the end sees all of them."""


class HessianWalk:
    """Walks a model with calibration text; each layer's weights may be replaced before the walk goes on.

    The embedding and the output matrix are there as the layer :data:`VOCABULARY`, where there are moments for them.

    Args:
        context: Gives the seed and the reporter.
        model: The model to quantize.
        settings: Give the number of calibration tokens.
        source: Text source; its training split is read.
        device: Where the model runs.
        dtype: In which precision.
        moments: Of the embedding and the output matrix, by module name; none where they are not chosen for.
        most: At most so many tokens; None: all of them.
        way: How the model is opened.

    Attributes:
        tokens: How many are read.
        calibration: What a stage records of the windows; of all of them, also where ``most`` leaves some out.
    """

    def __init__(
        self,
        context: Context,
        model: ModelInput,
        settings: QuantizeSettings,
        source: str,
        device: str,
        dtype: Any,
        *,
        moments: Mapping[str, MatrixMoments] = NO_MOMENTS,
        most: int | None = None,
        way: Way = WHOLE,
    ) -> None:
        self._arch, self._engine = model.architecture, LocalEngine(way.workers)
        self._moments = moments
        self._network = way.open(model.path, dtype=dtype, device=device)
        windows = full_calibration(context, model.path, source, tokens=settings.calibration_tokens)
        ids = windows.ids if most is None else windows.ids[: max(1, most // windows.ids.shape[1])]
        self._ids = ids
        self._batch = next(
            size for size in range(BATCH, 0, -1) if len(ids) % size == 0
        )  # no window is left over
        self._begun: LayerWalk | None = None
        self.tokens = ids.numel()
        self.calibration = windows_record(windows)

    def _begin(self) -> LayerWalk:
        """In front of the first layer, behind the embedding as it now is."""
        if self._begun is None:
            with torch.no_grad():
                self._begun = LayerWalk(self._network, self._arch, self._ids, batch=self._batch)
        return self._begun

    @property
    def _walk(self) -> LayerWalk:
        return self._begin()

    @torch.no_grad()
    def statistics(self, layer: int, *, advance: bool = False) -> dict[str, InputStatistics]:
        """Module name -> statistics of its inputs, for every linear of ``layer``.

        With ``advance`` the same pass goes on to the next layer, through this one as it is.
        """
        found: dict[str, InputStatistics] = {}

        def keep(job: tuple[tuple[str, ...], Tensor], statistics: InputStatistics) -> None:
            found.update(dict.fromkeys(job[0], statistics))

        self._engine.run(_statistics_of, self.moments(layer, advance=advance), keep)
        if layer == VOCABULARY:
            return found
        names = [self._arch.module_name(layer, spec) for spec in self._arch.linears_at(layer)]
        return {name: found[name] for name in names}

    @torch.no_grad()
    def moments(self, layer: int, *, advance: bool = False) -> Iterator[tuple[tuple[str, ...], Tensor]]:
        """The modules of ``layer`` that read the same inputs, and the mean ``X X^T`` [I, I] of these, float64.

        The largest come first, and each is held by the caller alone. ``advance``: see :meth:`statistics`.
        """
        if layer == VOCABULARY:
            return iter([((name,), known.gram.cpu()) for name, known in self._moments.items()])
        first: dict[str, LinearSpec] = {}
        readers: dict[LinearSpec, list[str]] = {}
        for spec in self._arch.linears_at(layer):
            source = first.setdefault(SHARED_INPUT.get(spec.role, spec.name), spec)
            readers.setdefault(source, []).append(self._arch.module_name(layer, spec))
        wanted = dict.fromkeys(first.values())
        with gathered_grams(self._walk.layers[layer], wanted, only=not advance) as grams:
            (self._walk.advance if advance else self._walk.look)(layer)
        largest = sorted(readers, key=lambda spec: -len(grams[spec]))
        # on the host, where weights are rounded
        return ((tuple(readers[spec]), grams.pop(spec).div_(self.tokens).cpu()) for spec in largest)

    @torch.no_grad()
    def advance(self, layer: int, weights: Mapping[str, Tensor] | None = None) -> None:
        """Go on to the next layer, through this one as it is or with the weights given by module name [out, in]."""
        if layer == VOCABULARY:
            known = (weights or {}).get(self._arch.embedding_module)
            if known is not None:
                with resident(self._network.get_submodule(self._arch.embedding_module)):
                    self._network.get_parameter(self._arch.embedding).copy_(known)
                    self._begin()
            return
        with resident(self._walk.layers[layer]):
            for spec in self._arch.linears_at(layer):
                name = self._arch.module_name(layer, spec)
                if weights is not None and name in weights:
                    parameter = self._network.get_parameter(f"{name}.weight")
                    parameter.copy_(weights[name].t() if spec.transposed else weights[name])
            self._walk.advance(layer)


def _statistics_of(job: tuple[tuple[str, ...], Tensor]) -> InputStatistics:
    return input_statistics(job[1])


def sensitivities(
    context: Context,
    model: ModelInput,
    settings: QuantizeSettings,
    source: str,
    device: str,
    dtype: Any,
    way: Way = WHOLE,
) -> tuple[dict[str, Tensor], dict[str, MatrixMoments]]:
    """What a unit of squared output error costs, in nats per token: half the mean squared gradient there, float32 [O].

    Args:
        context: Gives the seed and the reporter.
        model: The model to quantize.
        settings: Give the number of calibration tokens, of which a share is used.
        source: Text source; its training split is read.
        device: Where the model runs.
        dtype: In which precision.
        way: How the model is opened.

    Returns:
        By module name; and, where embeddings are chosen for, the moments of the embedding and the output matrix.
    """
    network = way.open(model.path, dtype=dtype, device=device)
    windows = full_calibration(context, model.path, source, tokens=settings.calibration_tokens)
    count = max(1, min(round(GRADIENT_SHARE * len(windows)), GRADIENT_TOKENS // windows.ids.shape[1]))
    batches = windows.ids[:count].to(device).split(GRADIENT_BATCH)
    with context.reporter.bar("sensitivities") as progress, recomputing(network, required=False):
        found = output_sensitivities(
            network, model.architecture, batches, summed_loss(network), progress=progress
        )
        at_embedding = found.pop(model.architecture.embedding_module)
        moments: dict[str, MatrixMoments] = {}
        if settings.embeddings == "menu":
            moments = vocabulary_moments(model, network, batches, at_embedding, progress)
    minds = {name: (0.5 * mean).float().cpu() for name, mean in found.items()}
    return minds | {name: known.minds.cpu() for name, known in moments.items()}, moments
