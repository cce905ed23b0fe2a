"""What every criterion of the registry promises."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

from compress.errors import CompressError
from compress.importance import CRITERIA
from compress.importance.base import Criterion, GroupScores, create_criterion
from compress.model.architecture import Architecture
from compress.prune.select import select
from tests.tiny import tiny_model
from tests.unit.prune.common import backward, model_architecture, with_lora

KINDS = ["llama_gqa", "llama_mqa", "qwen2", "qwen3", "phi3", "gpt2"]


def prepared(kind: str, *, seed: int = 0) -> tuple[Any, Architecture]:
    model = tiny_model(kind, seed)
    arch = model_architecture(model)
    peft_model = with_lora(model, arch, seed=seed)
    backward(peft_model, seed=seed)
    return peft_model, arch


def observed(name: str, model: Any, arch: Architecture, *, seed: int = 0) -> Criterion:
    criterion = create_criterion(name, arch, seed=seed)
    criterion.observe(model)
    return criterion


def equal(one: GroupScores, other: GroupScores) -> bool:
    return all(
        torch.equal(a.kv_groups, b.kv_groups) and torch.equal(a.channels, b.channels)
        for a, b in zip(one.layers, other.layers, strict=True)
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CRITERIA.names())
def test_scores_have_the_shape_of_the_model_and_rank_its_groups(name: str, kind: str) -> None:
    model, arch = prepared(kind)
    criterion = observed(name, model, arch)
    scores = criterion.scores()
    assert len(scores.layers) == arch.layers
    for layer in scores.layers:
        assert layer.kv_groups.shape == (arch.kv_heads,)
        assert layer.channels.shape == (arch.channels,)
        assert layer.kv_groups.dtype == layer.channels.dtype == torch.float64
        assert layer.channels.device.type == "cpu"
        assert bool((layer.channels >= 0).all())
        assert bool((layer.kv_groups >= 0).all())
        assert len(layer.channels.unique()) > arch.channels // 2
    assert scores.finite
    assert (criterion.steps, criterion.skipped_steps) == (1, 0)
    half = select(arch, scores, arch.kv_heads, arch.channels // 2)
    best = [set(layer.channels.topk(arch.channels // 2).indices.tolist()) for layer in scores.layers]
    assert [set(layer.channels.tolist()) for layer in half] == best


@pytest.mark.parametrize("name", CRITERIA.names())
def test_the_same_input_gives_the_same_scores(name: str) -> None:
    model, arch = prepared("llama_gqa")
    first = observed(name, model, arch).scores()
    assert equal(first, observed(name, model, arch).scores())
    other_model, _ = prepared("llama_gqa", seed=1)
    assert not equal(first, observed(name, other_model, arch, seed=1).scores())


@pytest.mark.parametrize("name", CRITERIA.names())
def test_observing_changes_neither_weights_nor_gradients(name: str) -> None:
    model, arch = prepared("llama_gqa")
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    observed(name, model, arch)
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    for parameter, grad in zip(model.parameters(), grads, strict=True):
        assert (grad is None) == (parameter.grad is None)
        assert grad is None or torch.equal(grad, parameter.grad)


@pytest.mark.parametrize("name", CRITERIA.names())
def test_state_survives_a_restart(name: str) -> None:
    model, arch = prepared("llama_gqa")
    criterion = observed(name, model, arch)
    restored = create_criterion(name, arch)
    restored.load_state_dict(criterion.state_dict())
    assert (restored.steps, restored.skipped_steps) == (1, 0)
    if criterion.requires_training:
        assert equal(restored.scores(), criterion.scores())


@pytest.mark.parametrize("name", [name for name in CRITERIA.names() if name != "random"])
def test_scores_need_an_observation(name: str) -> None:
    _, arch = prepared("llama_gqa")
    with pytest.raises(CompressError, match="no importance scores"):
        create_criterion(name, arch).scores()


@pytest.mark.parametrize("name", CRITERIA.names())
def test_every_entry_is_a_documented_criterion(name: str) -> None:
    kind = CRITERIA.get(name)
    assert issubclass(kind, Criterion)
    assert kind.__doc__
    assert isinstance(kind.requires_training, bool)


def test_listing_the_names_imports_no_torch() -> None:
    code = (
        "import sys; from compress.importance import CRITERIA; print(CRITERIA.names()); "
        "raise SystemExit('torch' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == str(CRITERIA.names())
    assert {"lora", "magnitude", "random"} <= set(CRITERIA.names())
