"""The refit of o and down, for trials and for the cut: from moments on disk where these can be kept."""

from __future__ import annotations

import shutil
from collections.abc import MutableMapping

from torch import Tensor, nn

from compress.importance.gram_store import GramStore, fits
from compress.importance.moments import OUTPUTS
from compress.kept import NOTHING_KEPT, Kept
from compress.model.architecture import Architecture
from compress.model.checkpoint import Checkpoint
from compress.model.tensor_folder import TensorFolder
from compress.pipelines.measure import calibration_windows
from compress.pipelines.model_input import ModelInput
from compress.pipelines.prune_place import BATCH, Place
from compress.progress import Progress
from compress.prune.compensate import compensate, gather_moments, refit_from_store
from compress.structure import StructureMap

REFITTED = "refitted"


def refitted(
    place: Place,
    model: ModelInput,
    structure: StructureMap,
    store: GramStore,
    *,
    tokens: int,
    network: nn.Module | None = None,
    kept: Kept = NOTHING_KEPT,
    progress: Progress | None = None,
) -> MutableMapping[str, Tensor]:
    """New weights of o and down for ``structure``, float32 [out, in] at full size, by module.

    The moments of the inputs are gathered on ``tokens`` tokens when they are not in ``store`` yet; a model too wide
    to keep them is run again for every structure.

    Args:
        place: Where to compute and what to read.
        model: The model that is pruned.
        structure: What is kept.
        store: Where the moments are.
        tokens: Calibration tokens.
        network: ``model`` when it is loaded already, without masks.
        kept: Has what an interrupted run for the same structure has refitted.
        progress: Called after every layer.
    """
    into = _folder(place, store)
    arch, keeps = model.architecture, fits(model.architecture, OUTPUTS)
    if not keeps or not store.complete(arch):
        windows = calibration_windows(place.context, model.path, place.source, tokens=tokens)
        batch = min(BATCH, len(windows))
        if not keeps:
            return compensate(
                network or place.load(model.path),
                arch,
                structure,
                windows.ids,
                batch=batch,
                into=into,
                kept=kept,
                progress=progress,
            )
        # no name for the model here: it goes before the systems are solved
        gather_moments(
            network or place.load(model.path), arch, windows.ids, store, batch=batch, progress=progress
        )
    return refit_from_store(
        lambda name: stored_weight(model.checkpoint, arch, name),
        arch,
        structure,
        store,
        into=into,
        kept=kept,
        engine=place.context.engine,
        progress=progress,
    )


def _folder(place: Place, store: GramStore) -> TensorFolder | None:
    """Where new weights go that memory has no room for together, beside the moments; emptied first."""
    folder = store.folder.parent / REFITTED
    shutil.rmtree(folder, ignore_errors=True)
    return TensorFolder(folder) if place.way.streamed else None


def stored_weight(checkpoint: Checkpoint, arch: Architecture, name: str) -> Tensor:
    """A decoder linear's weight on disk, float32 [out, in]."""
    turned = {arch.module_name(i, s) for i in range(arch.layers) for s in arch.linears if s.transposed}
    weight = checkpoint.read(f"{name}.weight").float()
    return weight.t() if name in turned else weight
