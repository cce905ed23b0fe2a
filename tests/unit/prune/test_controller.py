from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch

from compress.errors import CompressError
from compress.importance.base import Criterion, GroupScores, Needs, create_criterion
from compress.model.architecture import Architecture
from compress.prune.controller import PruneController
from compress.prune.schedule import PruningSchedule
from compress.prune.select import select
from compress.prune.shape import ShapePlan, plan_of
from compress.prune.uniform import choose_shape
from compress.structure import LayerShape, LayerStructure, full_layer, full_shape, kept_heads, structure_map
from tests.tiny import tiny_model
from tests.unit.prune.common import backward, model_architecture, with_lora
from tests.unit.prune.layouts import random_scores


class Scripted(Criterion):
    """New random scores at every step, so that the ranking keeps changing."""

    needs: ClassVar[Needs] = "adapters"

    def observe(self, model: torch.nn.Module) -> None:
        self.steps += 1

    def scores(self) -> GroupScores:
        return random_scores(self.arch, self.steps)


class Handed(Scripted):
    """Observed by the caller, as a criterion is that needs activations."""

    needs: ClassVar[Needs] = "activations"


UNEVEN = [(3, 2, 20), (2, 1, 40), (0, 2, 8)]
"""Shapes of the layers of an uneven plan; the attention of the last is gone."""


def setup(ratio: float = 0.5) -> tuple[Any, Architecture, ShapePlan]:
    model = tiny_model("llama_gqa")
    arch = model_architecture(model)
    return model, arch, choose_shape(arch, ratio, multiple=8)


def uneven(arch: Architecture) -> ShapePlan:
    shapes = [LayerShape(kv_heads=kv, queries=q, channels=c) for kv, q, c in UNEVEN[: arch.layers]]
    return plan_of(arch, shapes, 0.5, "")


@pytest.mark.parametrize("total", [1, 2, 7, 40, 100])
@pytest.mark.parametrize("even", [True, False])
def test_pruned_stays_pruned_and_the_end_is_exact(total: int, even: bool) -> None:
    model, arch, plan = setup()
    plan = plan if even else uneven(arch)
    schedule = PruningSchedule(total_steps=total)
    alive = [full_layer(arch)] * arch.layers
    with PruneController(model, arch, Scripted(arch), schedule, plan) as controller:
        for step in range(total):
            controller.before_step(step)
            for index, layer in enumerate(controller.layers):
                for now, before in zip(units(arch, layer), units(arch, alive[index]), strict=True):
                    assert now <= before
                alive[index] = layer
            if schedule.due(step):
                structure = structure_map(arch, controller.layers, base_fingerprint="")
                wanted = [schedule.shape(step, full_shape(arch), shape) for shape in plan.shapes]
                assert list(structure.shapes) == wanted
        before_end = controller.layers
        structure = controller.structure(base_fingerprint="base")
    assert structure.layers == before_end  # the last step had reached the target already
    assert structure.shapes == plan.shapes
    assert structure.uniform == plan.uniform
    assert structure.base_fingerprint == "base"


def units(arch: Architecture, layer: LayerStructure) -> list[set[int]]:
    return [set(part.tolist()) for part in (layer.kv_groups, layer.channels, kept_heads(arch, layer))]


def test_query_heads_alone_go_too() -> None:
    model, arch, _ = setup()
    shape = LayerShape(kv_heads=arch.kv_heads, queries=1, channels=arch.channels)
    plan = plan_of(arch, [shape] * arch.layers, 0.1, "")
    with PruneController(model, arch, Scripted(arch), PruningSchedule(total_steps=9), plan) as controller:
        for step in range(9):
            controller.before_step(step)
        assert structure_map(arch, controller.layers, base_fingerprint="").uniform == shape
        assert controller.structure(base_fingerprint="").uniform == shape


def test_training_that_ends_early_and_one_shot_reach_the_target() -> None:
    model, arch, _ = setup()
    plan = uneven(arch)
    controller = PruneController(model, arch, Scripted(arch), PruningSchedule(total_steps=100), plan)
    for step in range(30):
        controller.before_step(step)
    assert controller.structure(base_fingerprint="").shapes == plan.shapes
    controller.close()

    criterion = Scripted(arch)
    schedule = PruningSchedule(total_steps=10)
    with PruneController(model, arch, criterion, schedule, plan, one_shot=True) as controller:
        for step in range(10):
            controller.before_step(step)
            assert len(controller.layers[0].channels) == arch.channels
        structure = controller.structure(base_fingerprint="")
    assert structure.layers == select(arch, criterion.scores(), plan.shapes)


def test_the_model_runs_masked_while_training_and_whole_afterwards() -> None:
    model, arch, plan = setup()
    ids = torch.arange(4, 20)[None]
    with torch.no_grad():
        plain = model(ids).logits
    peft_model = with_lora(model, arch, scale=0.0)
    criterion = create_criterion("lora", arch)
    with PruneController(peft_model, arch, criterion, PruningSchedule(total_steps=20), plan) as controller:
        losses = []
        for step in range(20):
            backward(peft_model, seed=step)
            controller.before_step(step)
            with torch.no_grad():
                losses.append(float((peft_model(ids).logits - plain).norm()))
        kept = controller.layers
        assert controller.skipped_steps == 0
    assert losses[0] == losses[1] == 0
    assert min(losses[8:]) > 0
    assert losses[-1] != losses[8]
    with torch.no_grad():
        torch.testing.assert_close(peft_model(ids).logits, plain)
    grads = model.model.layers[0].mlp.gate_proj.lora_B["default"].weight.grad.abs().sum(dim=1)
    gone = torch.ones(arch.channels, dtype=torch.bool)
    gone[kept[0].channels.long()] = False
    assert bool((grads[gone] == 0).all())  # a pruned channel gets no gradient any more
    assert bool((grads[~gone] != 0).any())


def test_a_shape_left_to_the_scores_is_chosen_at_the_first_mask() -> None:
    model, arch, plan = setup()
    criterion = Scripted(arch)
    chosen_at: list[int] = []

    def choose(scores: GroupScores) -> ShapePlan:
        chosen_at.append(criterion.steps)
        return choose_shape(arch, 0.5, multiple=8, scores=scores)

    schedule = PruningSchedule(total_steps=50)
    with PruneController(model, arch, criterion, schedule, choose) as controller:
        for step in range(50):
            controller.before_step(step)
        structure = controller.structure(base_fingerprint="")
        assert structure.uniform == controller.plan.uniform
    first = next(step for step in range(50) if schedule.due(step) and schedule.progress(step) > 0)
    assert chosen_at == [first + 1]
    assert plan.requested == controller.plan.requested


@pytest.mark.parametrize("target", ["uniform", "uneven", "chosen"])
def test_a_resumed_run_ends_like_an_uninterrupted_one(target: str) -> None:
    def build() -> tuple[Any, PruneController]:
        model, arch, plan = setup()
        peft_model = with_lora(model, arch)

        def choose(scores: GroupScores) -> ShapePlan:
            return choose_shape(arch, 0.5, multiple=8, scores=scores)

        criterion = create_criterion("lora", arch)
        shape: ShapePlan | Callable[[GroupScores], ShapePlan] = choose
        if target != "chosen":
            shape = plan if target == "uniform" else uneven(arch)
        return peft_model, PruneController(peft_model, arch, criterion, PruningSchedule(total_steps=8), shape)

    whole_model, whole = build()
    first_model, first = build()
    second_model, second = build()
    for step in range(8):
        backward(whole_model, seed=step)
        whole.before_step(step)
        if step == 6:
            state = {name: value.clone() for name, value in first.state_dict().items()}
            assert any(name.endswith("query_heads") for name in state if name.startswith("alive.")) == any(
                layer.query_heads is not None for layer in first.layers
            )
            second.load_state_dict(state)
            assert second.layers == first.layers
        model, controller = (first_model, first) if step < 6 else (second_model, second)
        backward(model, seed=step)
        controller.before_step(step)
        assert controller.layers == whole.layers
    if target == "uneven":
        assert any(layer.query_heads is not None for layer in whole.layers)
    assert second.structure(base_fingerprint="") == whole.structure(base_fingerprint="")
    assert second.plan == whole.plan


def test_a_criterion_that_needs_weights_is_observed_once() -> None:
    model, arch, plan = setup()
    criterion = create_criterion("magnitude", arch)
    for _ in range(2):  # the second controller finds it observed
        with PruneController(model, arch, criterion, PruningSchedule(total_steps=5), plan) as controller:
            for step in range(5):
                controller.before_step(step)
            structure = controller.structure(base_fingerprint="")
        assert criterion.steps == 1
    assert structure.layers == select(arch, criterion.scores(), plan.shapes)


def test_a_criterion_observed_by_the_caller_is_left_as_it_is() -> None:
    model, arch, plan = setup()
    criterion = Handed(arch)
    criterion.observe(model)
    with PruneController(model, arch, criterion, PruningSchedule(total_steps=5), plan) as controller:
        for step in range(5):
            controller.before_step(step)
        structure = controller.structure(base_fingerprint="")
    assert criterion.steps == 1
    assert structure.layers == select(arch, random_scores(arch, 1), plan.shapes)


def test_scores_that_the_caller_forgot_are_missed_at_the_first_mask() -> None:
    model, arch, plan = setup()
    criterion, schedule = create_criterion("wanda", arch), PruningSchedule(total_steps=20)
    first = next(step for step in range(20) if schedule.due(step) and schedule.progress(step) > 0)
    with PruneController(model, arch, criterion, schedule, plan) as controller:
        for step in range(first):
            controller.before_step(step)
        with pytest.raises(CompressError, match="no importance scores"):
            controller.before_step(first)


def test_without_a_finite_score_nothing_is_pruned() -> None:
    model, arch, plan = setup()
    peft_model = with_lora(model, arch)
    with PruneController(
        peft_model, arch, create_criterion("lora", arch), PruningSchedule(total_steps=4), plan
    ) as controller:
        for step in range(4):
            backward(peft_model, seed=step)
            for parameter in peft_model.parameters():
                if parameter.grad is not None:
                    parameter.grad.fill_(float("nan"))
            controller.before_step(step)
        assert len(controller.layers[0].channels) == arch.channels
        assert controller.skipped_steps == 4
        with pytest.raises(CompressError, match="4 of them not finite"):
            controller.structure(base_fingerprint="")
