"""Biases for what pruning removes, for trials and for the cut: the mean inputs are gathered once."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from compress.kept import Kept
from compress.model.architecture import Architecture
from compress.pipelines.measure import calibration_windows
from compress.pipelines.model_input import ModelInput
from compress.pipelines.prune_place import BATCH, Place
from compress.pipelines.prune_refit import stored_weight
from compress.prune.mean_bias import mean_biases, mean_inputs
from compress.structure import StructureMap, kept_columns


def bias_additions(
    place: Place,
    model: ModelInput,
    structure: StructureMap,
    tokens: int,
    kept: Kept,
    network: nn.Module | None = None,
) -> Mapping[str, Tensor]:
    """The mean of what the removed inputs of o and down added, by module.

    Args:
        place: Where to compute and what to read.
        model: The model that is pruned.
        structure: What is kept.
        tokens: Calibration tokens.
        kept: Has the mean inputs, which serve every structure, or takes them up.
        network: ``model`` when it is loaded already, without masks.
    """

    def gather() -> Mapping[str, Tensor]:
        windows = calibration_windows(place.context, model.path, place.source, tokens=tokens)
        with place.context.reporter.bar("mean inputs of o and down") as progress:
            return mean_inputs(
                network or place.load(model.path),
                model.architecture,
                windows.ids,
                batch=min(BATCH, len(windows)),
                progress=progress,
            )

    means = kept.tensors("mean-inputs", gather)
    arch = model.architecture
    return mean_biases(lambda name: stored_weight(model.checkpoint, arch, name), arch, structure, means)


def unrepaired(arch: Architecture, structure: StructureMap, biases: Mapping[str, Tensor]) -> list[str]:
    """The modules among ``biases`` whose whole branch is gone, so that the cut model has no place for them."""
    return [
        name
        for index, layer in enumerate(structure.layers)
        for spec in arch.linears_at(index)
        if (name := arch.module_name(index, spec)) in biases
        and (columns := kept_columns(arch, spec, layer)) is not None
        and len(columns) == 0
    ]
