from __future__ import annotations

from typing import Any

import pytest
import torch

from compress.errors import CompressError
from compress.importance.base import Criterion, GroupScores, LayerScores, create_criterion
from compress.model.architecture import Architecture
from compress.prune.controller import PruneController
from compress.prune.schedule import PruningSchedule
from compress.prune.select import ShapePlan, choose_shape, select
from tests.tiny import tiny_model
from tests.unit.prune.common import backward, model_architecture, with_lora


class Scripted(Criterion):
    """New random scores at every step, so that the ranking keeps changing."""

    requires_training = True

    def observe(self, model: torch.nn.Module) -> None:
        self.steps += 1

    def scores(self) -> GroupScores:
        generator = torch.Generator().manual_seed(self.steps)
        return GroupScores(
            layers=tuple(
                LayerScores(
                    kv_groups=torch.rand(self.arch.kv_heads, generator=generator, dtype=torch.float64),
                    channels=torch.rand(self.arch.channels, generator=generator, dtype=torch.float64),
                )
                for _ in range(self.arch.layers)
            )
        )


def setup(ratio: float = 0.5) -> tuple[Any, Architecture, ShapePlan]:
    model = tiny_model("llama_gqa")
    arch = model_architecture(model)
    return model, arch, choose_shape(arch, ratio, multiple=8)


@pytest.mark.parametrize("total", [1, 2, 7, 40, 100])
def test_pruned_stays_pruned_and_the_end_is_exact(total: int) -> None:
    model, arch, plan = setup()
    schedule = PruningSchedule(total_steps=total)
    alive = [(set(range(arch.kv_heads)), set(range(arch.channels)))] * arch.layers
    with PruneController(model, arch, Scripted(arch), schedule, plan) as controller:
        for step in range(total):
            controller.before_step(step)
            for index, layer in enumerate(controller.layers):
                groups, channels = set(layer.kv_groups.tolist()), set(layer.channels.tolist())
                assert groups <= alive[index][0]
                assert channels <= alive[index][1]
                alive[index] = (groups, channels)
                if schedule.due(step):
                    assert len(channels) == schedule.kept(step, arch.channels, plan.channels)
                    assert len(groups) == schedule.kept(step, arch.kv_heads, plan.kv_heads)
        before = controller.layers
        structure = controller.structure(base_fingerprint="base")
    assert structure.layers == before  # the last step had reached the target already
    assert structure.uniform == (plan.kv_heads, plan.channels)
    assert structure.base_fingerprint == "base"


def test_training_that_ends_early_and_one_shot_reach_the_target() -> None:
    model, arch, plan = setup()
    criterion = Scripted(arch)
    controller = PruneController(model, arch, criterion, PruningSchedule(total_steps=100), plan)
    for step in range(30):
        controller.before_step(step)
    assert controller.structure(base_fingerprint="").uniform == (plan.kv_heads, plan.channels)
    controller.close()

    criterion = Scripted(arch)
    schedule = PruningSchedule(total_steps=10)
    with PruneController(model, arch, criterion, schedule, plan, one_shot=True) as controller:
        for step in range(10):
            controller.before_step(step)
            assert len(controller.layers[0].channels) == arch.channels
        structure = controller.structure(base_fingerprint="")
    assert structure.layers == select(arch, criterion.scores(), plan.kv_heads, plan.channels)


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
    assert losses[-1] > losses[8] > 0
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
        assert structure.uniform == (controller.plan.kv_heads, controller.plan.channels)
    first = next(step for step in range(50) if schedule.due(step) and schedule.progress(step) > 0)
    assert chosen_at == [first + 1]
    assert plan.requested == controller.plan.requested


@pytest.mark.parametrize("chosen_by_scores", [False, True])
def test_a_resumed_run_ends_like_an_uninterrupted_one(chosen_by_scores: bool) -> None:
    _, _, plan = setup()

    def build() -> tuple[Any, PruneController]:
        model, arch, _ = setup()
        peft_model = with_lora(model, arch)

        def choose(scores: GroupScores) -> ShapePlan:
            return choose_shape(arch, 0.5, multiple=8, scores=scores)

        criterion = create_criterion("lora", arch)
        shape = choose if chosen_by_scores else plan
        return peft_model, PruneController(peft_model, arch, criterion, PruningSchedule(total_steps=8), shape)

    whole_model, whole = build()
    first_model, first = build()
    second_model, second = build()
    for step in range(8):
        backward(whole_model, seed=step)
        whole.before_step(step)
        if step == 4:
            second.load_state_dict({name: value.clone() for name, value in first.state_dict().items()})
        model, controller = (first_model, first) if step < 4 else (second_model, second)
        backward(model, seed=step)
        controller.before_step(step)
        assert controller.layers == whole.layers
    assert second.structure(base_fingerprint="") == whole.structure(base_fingerprint="")
    assert second.plan == whole.plan


def test_a_criterion_without_training_is_observed_once() -> None:
    model, arch, plan = setup()
    criterion = create_criterion("magnitude", arch)
    with PruneController(model, arch, criterion, PruningSchedule(total_steps=5), plan) as controller:
        for step in range(5):
            controller.before_step(step)
        structure = controller.structure(base_fingerprint="")
    assert criterion.steps == 1
    assert structure.layers == select(arch, criterion.scores(), plan.kv_heads, plan.channels)


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
