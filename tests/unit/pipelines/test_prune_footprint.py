"""What ``prune`` is counted to hold: every model that is open, every matrix of statistics, every round on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from compress.model.layout import expected_shapes
from compress.model.planned import PlannedCheckpoint
from compress.pipelines.model_input import ModelInput
from compress.pipelines.phase import AGAIN, Footprint, Ground, Phase
from compress.pipelines.plan_models import PlannedModel
from compress.pipelines.prune_footprint import prune_footprint, size_after
from compress.pipelines.settings import PruneSettings, resolve
from tests.unit.prune.common import architecture

HIDDEN, CHANNELS, LAYERS, TOKENS = 512, 1376, 4, 4096
"""LLaMA-2-7B in an eighth of its width and depth."""
WHOLE = Ground(itemsize=2, length=512, windows=8)
STREAMED = Ground(itemsize=2, length=512, windows=8, streamed=True)
NONE: dict[str, Any] = {"repair": "none", "repair_steps": 0, "trials": 1, "calibration_tokens": TOKENS}


def planned(channels: int, *, layers: int = LAYERS, hidden: int = HIDDEN) -> PlannedModel:
    arch = architecture(
        layers=layers,
        hidden=hidden,
        heads=16,
        kv_heads=16,
        head_dim=hidden // 16,
        channels=channels,
        vocab=1000,
    )
    shapes = expected_shapes(arch)
    checkpoint = PlannedCheckpoint(
        Path("made-up"),
        config={"model_type": "llama"},
        shapes=shapes,
        dtypes=dict.fromkeys(shapes, torch.bfloat16),
    )
    model = ModelInput(name="m", path=Path("made-up"), id="", checkpoint=checkpoint, architecture=arch)
    return PlannedModel(name="m", input=model)


FULL, SMALL = planned(CHANNELS), planned(CHANNELS // 2)


def count(ground: Ground = WHOLE, **given: Any) -> Footprint:
    return prune_footprint(FULL, SMALL, resolve(PruneSettings, NONE | given, "quick"), ground)


def phase(footprint: Footprint, name: str) -> Phase:
    (found,) = [each for each in footprint.phases if each.name == name]
    return found


def peak(footprint: Footprint) -> float:
    return max(sum(each.device.values()) + sum(each.host.values()) for each in footprint.phases)


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ({"criterion": "taylor"}, "score"),
        ({"criterion": "lora"}, "score and mask"),
        ({"criterion": "wanda", "repair": "lora"}, "score and mask"),
        ({"criterion": "obs"}, "output gradients"),
        ({"criterion": "wanda", "shape": "allocated"}, "gradients of costs"),
        ({"criterion": "wanda", "repair_steps": 4}, "repair"),
    ],
)
def test_layers_that_run_again_keep_their_inputs_alone(given: dict[str, Any], name: str) -> None:
    """A layer less for each of the others; nothing else is counted otherwise."""
    plain, again = count(**given), count(**given, recompute=True)
    before, after = phase(plain, name), phase(again, f"{name}{AGAIN}")
    kept, left = before.device["activations"], after.device["activations"]
    micro = resolve(PruneSettings, NONE | given, "quick")
    tokens = {"score": 4 * 512, "output gradients": 512, "gradients of costs": 512}.get(
        name, micro.micro_batch * micro.sequence
    )
    ends = tokens * 12 * HIDDEN if name in ("score and mask", "repair") else 0
    assert left - ends == pytest.approx((kept - ends) / LAYERS + tokens * LAYERS * 2 * HIDDEN)
    assert {k: v for k, v in before.device.items() if k != "activations"} == {
        k: v for k, v in after.device.items() if k != "activations"
    }
    rest = [
        [each for each in found.phases if each is not own] for found, own in ((plain, before), (again, after))
    ]
    assert rest[0] == rest[1]


def test_a_streamed_model_is_counted_the_same_with_and_without() -> None:
    plain, again = (count(STREAMED, recompute=recompute) for recompute in (False, True))
    before, after = phase(plain, "output gradients"), phase(again, f"output gradients{AGAIN}")
    assert before.device == after.device


@pytest.mark.parametrize("ground", [WHOLE, STREAMED])
@pytest.mark.parametrize("criterion", ["wanda", "flap", "magnitude", "random", "taylor"])
def test_an_allocation_measures_costs_beside_the_model_that_was_scored(
    criterion: str, ground: Ground
) -> None:
    """Inverses of a 7B's widest moments alone are 40 * 11008^2 bytes; here an eighth squared of that."""
    plain, allocated = (count(ground, criterion=criterion, shape=shape) for shape in ("uniform", "allocated"))
    obs = count(ground, criterion="obs", shape="allocated")
    costs, scored = phase(allocated, "measure costs"), phase(obs, "score")
    assert costs.device["input moments"] >= 40 * CHANNELS**2
    beside = sum(costs.device.values()) - sum(scored.device.values())
    once = plain.phases[0].device  # as the model is opened for scoring
    assert beside == pytest.approx(sum(once.values()))
    assert peak(allocated) > peak(plain) or criterion == "taylor"  # whose gradients are as large as the model
    assert not [each for each in obs.phases if "cost" in each.name]


def test_an_allocation_in_training_holds_two_models() -> None:
    found = phase(count(criterion="lora", steps=2, shape="allocated"), "measure costs").device
    assert found["weights in training"] == found["weights"] == FULL.loaded(2)
    assert found["adapters in training"] > 0


@pytest.mark.parametrize("criterion", ["wanda", "flap", "magnitude", "taylor", "lora"])
def test_a_refit_gathers_what_scoring_has_not(criterion: str) -> None:
    given = {"criterion": criterion, "repair": "refit"} | ({"steps": 2} if criterion == "lora" else {})
    found = phase(count(**given), "moments of inputs").device
    assert found["weights"] == FULL.loaded(2)
    assert found["hidden states"] >= TOKENS * HIDDEN * 2
    assert found["input moments"] >= 8 * (HIDDEN**2 + CHANNELS**2)
    solved = phase(count(**given), "refit").host
    assert solved["least squares"] >= 2 * 8 * HIDDEN * CHANNELS
    obs = count(criterion="obs", repair="refit")
    assert not [each for each in obs.phases if each.name == "moments of inputs"]
    assert phase(obs, "refit").host == solved


def test_a_refit_without_room_for_moments_holds_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compress.importance.gram_store.LIMIT", 1000)
    found = phase(count(criterion="obs", repair="refit"), "refit").device
    assert found["weights"] == FULL.loaded(2)
    assert found["hidden states"] >= TOKENS * HIDDEN * 2
    assert found["least squares"] >= 8 * HIDDEN * CHANNELS


def test_biases_hold_hidden_states() -> None:
    found = phase(count(criterion="flap", repair="bias"), "mean inputs").device
    assert found["weights"] == FULL.loaded(2)
    assert found["hidden states"] >= TOKENS * HIDDEN * 2


def test_training_after_scores_by_moments_counts_both() -> None:
    names = [each.name for each in count(criterion="obs", repair="lora", steps=2).phases]
    assert names[1:4] == ["output gradients", "score", "score and mask"]


@pytest.mark.parametrize("rounds", [1, 2, 5])
def test_every_round_leaves_a_cut_and_a_model_larger_than_the_last(rounds: int) -> None:
    given = {"criterion": "magnitude", "rounds": rounds}
    found = count(**given).disk_peak
    kept = (SMALL.linears / FULL.linears) ** (1 / rounds)
    rest = FULL.file_bytes - 2 * FULL.linears
    models = [rest + 2 * FULL.linears * kept**number for number in range(1, rounds + 1)]
    assert models[-1] == pytest.approx(SMALL.file_bytes, rel=1e-3)
    assert found == pytest.approx(2 * sum(models), rel=1e-3)
    assert size_after(FULL, FULL, 0.5) == FULL.file_bytes
    if rounds > 1:
        trained = count(**given, repair_steps=rounds).disk_peak
        assert trained - count(criterion="magnitude", repair_steps=1).disk_peak > 2 * sum(models[:-1])


def test_kept_work_is_on_disk() -> None:
    plain = count(criterion="magnitude").disk_peak - SMALL.file_bytes
    changed = count(STREAMED, criterion="obs", repair="refit").disk_peak - SMALL.file_bytes
    moments = 4 * LAYERS * (HIDDEN**2 + CHANNELS**2)
    curvature = 8 * LAYERS * HIDDEN**2
    columns = 4 * LAYERS * HIDDEN * CHANNELS // 2
    whole = 4 * LAYERS * HIDDEN * CHANNELS
    assert changed - plain == pytest.approx(moments + curvature + columns + whole)
