"""The first way that fits is taken, and what is counted for a streamed model is what it holds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from compress.adapters.batched import LIMIT
from compress.model.checkpoint import Checkpoint, checkpoint_architecture
from compress.model.planned import PlannedCheckpoint
from compress.model.resident import unit_of
from compress.model.streamed import stream_model
from compress.pipelines import footprint
from compress.pipelines.footprint import recover_footprint
from compress.pipelines.model_input import ModelInput
from compress.pipelines.phase import Footprint, Ground, Phase, held
from compress.pipelines.plan_verdict import PROCESS
from compress.pipelines.way import WHOLE
from compress.pipelines.ways import best_fit, counted
from tests.tiny import tiny_checkpoint

GROUND = Ground(itemsize=4, length=128, windows=8)
MB = 1_000_000


def stage(ground: Ground) -> Footprint:
    """900 MB whole, 300 MB streamed, 100 MB of it read ahead."""
    weights = 900 * MB
    if ground.streamed:
        weights = 300 * MB if ground.ahead else 200 * MB
    phase = Phase(name="score", device={"weights": weights, "hidden states": 10 * MB})
    return Footprint(verb="prune", phases=(phase,), disk_peak=0.0, disk_kept=0.0)


@pytest.mark.parametrize(
    ("limit", "streamed", "ahead", "fits"),
    [
        (None, False, True, None),
        (PROCESS + 911 * MB, False, True, True),
        (PROCESS + 909 * MB, True, True, True),
        (PROCESS + 310 * MB, True, True, True),
        (PROCESS + 309 * MB, True, False, True),
        (PROCESS + 209 * MB, True, False, False),
    ],
)
def test_the_first_way_that_fits(limit: float | None, streamed: bool, ahead: bool, fits: bool | None) -> None:
    found = best_fit(stage, GROUND, "prune", limit=None if limit is None else int(limit), device_free=None)
    assert (found.way.streamed, found.way.ahead, found.fits) == (streamed, ahead, fits)
    assert (found.change is None) == (fits is not False)


def test_a_stage_that_cannot_stream_is_opened_whole() -> None:
    found = best_fit(stage, GROUND, "align", limit=int(PROCESS + 400 * MB), device_free=None, streams=False)
    assert found.way == WHOLE
    assert found.fits is False


def test_a_small_device_streams_too() -> None:
    found = best_fit(stage, GROUND, "prune", limit=int(64e9), device_free=400 * MB)
    assert found.way.streamed
    assert found.fits is True


@pytest.mark.parametrize("kind", ["llama_gqa", "llama_tied", "qwen2"])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_what_is_counted_is_what_a_streamed_model_holds(kind: str, itemsize: int, tmp_path: Path) -> None:
    folder = tiny_checkpoint(kind, tmp_path / "m", dtype=torch.bfloat16)
    checkpoint = Checkpoint(folder)
    model = counted(
        ModelInput(
            name=kind,
            path=folder,
            id="",
            checkpoint=checkpoint,
            architecture=checkpoint_architecture(checkpoint),
        )
    )
    network = stream_model(folder, dtype=torch.bfloat16 if itemsize == 2 else torch.float32)
    units = [unit for module in network.modules() if (unit := unit_of(module)) is not None]
    sizes = [sum(slot.shape.numel() * itemsize for slot in unit.slots) for unit in units]
    stored = [sum(checkpoint.nbytes(slot.stored) for slot in unit.slots) for unit in units]
    inside = {id(slot.owner) for unit in units for slot in unit.slots}
    always = sum(
        parameter.numel() * itemsize
        for module in network.modules()
        if id(module) not in inside
        for parameter in module.parameters(recurse=False)
    )
    terms = held(model, Ground(itemsize=itemsize, length=8, windows=1, streamed=True))
    matrix = max(checkpoint.nbytes(name) for name in checkpoint.names)
    assert terms == {
        "weights that stay": always,
        "one part's weights": max(sizes) + matrix,
        "read ahead": max(stored),
    }
    assert sum(terms.values()) < held(model, Ground(itemsize=4, length=8, windows=1))["weights"] * 2


def test_recover_counts_the_merged_model(tmp_path: Path) -> None:
    folder = tiny_checkpoint("llama_gqa", tmp_path / "m")
    checkpoint = Checkpoint(folder)
    model = counted(
        ModelInput(
            name="m",
            path=folder,
            id="",
            checkpoint=checkpoint,
            architecture=checkpoint_architecture(checkpoint),
        )
    )
    plain, merged = (recover_footprint(model, 1000, GROUND, merged=merged) for merged in (False, True))
    assert merged.disk_kept - plain.disk_kept == model.file_bytes
    assert {phase.name for phase in merged.phases} - {phase.name for phase in plain.phases} == {"merge"}
    largest = max(checkpoint.nbytes(name) for name in checkpoint.names)
    assert merged.phases[-1].host == {"one matrix": 2 * largest}  # float32 as stored, and its change
    batched = recover_footprint(model, 1000, GROUND, merged=True, batched=True).phases[-1]
    assert batched.host == {"windows of matrices": 4 * LIMIT, "one matrix": largest}
    assert batched.device == {}  # models are opened on the host


@pytest.mark.parametrize(
    ("weights", "there", "back"),
    [(1 << 22, 1 << 26, 1 << 26), (1 << 25, 1 << 27, 1 << 26), (3 << 25, 1 << 28, 1 << 28)],
)
def test_windows_are_powers_of_two_that_hold_the_largest_matrix(weights: int, there: int, back: int) -> None:
    planned = PlannedCheckpoint(
        Path("m"), config={}, shapes={"w": (weights,), "n": (8,)}, dtypes=dict.fromkeys("wn", torch.bfloat16)
    )
    found = footprint._merging(planned, batched=True)
    assert found == {"windows of matrices": 2 * (there + back), "one matrix": 2 * weights}
    assert footprint._merging(planned, batched=False) == {"one matrix": 6 * weights}
