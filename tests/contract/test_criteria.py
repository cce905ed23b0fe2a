"""What every criterion of the registry promises."""

from __future__ import annotations

import copy
import inspect
import subprocess
import sys
from typing import Any, get_args

import pytest
import torch
from torch.nn import functional as F

from compress.errors import CompressError, UsageError
from compress.importance import CRITERIA
from compress.importance.activations import ActivationCriterion
from compress.importance.base import PARTS, Criterion, GroupScores, Needs, create_criterion
from compress.importance.collect import collect
from compress.importance.modules import decoder_linear
from compress.model.architecture import Architecture, LinearSpec
from tests.tiny import tiny_model
from tests.unit.prune.common import backward, model_architecture, with_lora

KINDS = ["llama_mha", "llama_gqa", "llama_mqa", "qwen2", "qwen3", "phi3", "gpt2"]
SEEING = [name for name in CRITERIA.names() if name != "random"]
"""Criteria that look at the model."""


def prepared(kind: str, *, seed: int = 0) -> tuple[Any, Architecture]:
    model = tiny_model(kind, seed)
    arch = model_architecture(model)
    peft_model = with_lora(model, arch, seed=seed)
    backward(peft_model, seed=seed)
    return peft_model, arch


def summed_loss(model: Any, ids: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=ids).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")


def observed(name: str, model: Any, arch: Architecture, *, seed: int = 0) -> Criterion:
    """One observation with what the criterion needs; ``model`` has adapters with gradients."""
    criterion = create_criterion(name, arch, seed=seed)
    if criterion.needs == "adapters":
        criterion.observe(model)
    else:
        ids = torch.randint(0, 128, (4, 9), generator=torch.Generator().manual_seed(seed))
        collect(criterion, model, arch, ids, loss=summed_loss, batch=2)
    return criterion


def equal(one: GroupScores, other: GroupScores) -> bool:
    tensors = other.to_tensors()
    return all(torch.equal(score, tensors[name]) for name, score in one.to_tensors().items())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CRITERIA.names())
def test_scores_have_the_shape_of_the_model_and_rank_its_groups(name: str, kind: str) -> None:
    model, arch = prepared(kind)
    criterion = observed(name, model, arch)
    scores = criterion.scores()
    assert len(scores.layers) == arch.layers
    sizes = {"kv_groups": arch.kv_heads, "channels": arch.channels, "query_heads": arch.heads}
    for layer in scores.layers:
        for part, size in sizes.items():
            score = getattr(layer, part)
            assert score.shape == (size,)
            assert score.dtype == torch.float64
            assert score.device.type == "cpu"
            assert bool((score >= 0).all())
            if name != "random" and part != "channels" and not arch.prunable_heads:
                assert not score.any()
            else:
                assert len(score.unique()) == size
    assert scores.finite
    assert (criterion.steps, criterion.skipped_steps) == (1, 0)


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
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("name", CRITERIA.names())
def test_state_survives_a_restart(name: str) -> None:
    model, arch = prepared("llama_gqa")
    criterion = observed(name, model, arch)
    restored = create_criterion(name, arch)
    restored.load_state_dict(criterion.state_dict())
    assert (restored.steps, restored.skipped_steps) == (1, 0)
    assert equal(restored.scores(), criterion.scores())
    fresh = create_criterion(name, arch)
    fresh.load_state_dict(create_criterion(name, arch).state_dict())
    assert (fresh.steps, fresh.skipped_steps) == (0, 0)


@pytest.mark.parametrize("name", SEEING)
def test_scores_need_an_observation(name: str) -> None:
    _, arch = prepared("llama_gqa")
    with pytest.raises(CompressError, match="no importance scores"):
        create_criterion(name, arch).scores()


def reordered(model: Any, arch: Architecture, heads: torch.Tensor, channels: torch.Tensor) -> Any:
    """A copy that computes the same with its query heads (and their KV groups) and channels in another order."""
    twin = copy.deepcopy(model)
    per_group = arch.heads // arch.kv_heads
    groups = heads[::per_group] // per_group

    def blocks(order: torch.Tensor) -> torch.Tensor:
        return (order[:, None] * arch.head_dim + torch.arange(arch.head_dim)).flatten()

    queries, keys = blocks(heads), blocks(groups)
    first_key = arch.heads * arch.head_dim
    rows = {
        "q": queries,
        "k": keys,
        "v": keys,
        "qkv": torch.cat([queries, first_key + keys, first_key + len(keys) + keys]),
        "gate": channels,
        "up": channels,
        "gate_up": torch.cat([channels, arch.channels + channels]),
    }
    columns = {"o": queries, "down": channels}

    def permute(spec: LinearSpec, module: Any) -> None:
        order = rows.get(spec.role, columns.get(spec.role))
        axis = int(spec.role in columns)
        base = module.base_layer
        base.weight.copy_(base.weight.index_select(axis ^ int(spec.transposed), order))
        factor = (module.lora_A if axis else module.lora_B)["default"].weight
        factor.copy_(factor.index_select(axis, order))
        if not axis and base.bias is not None:
            base.bias.copy_(base.bias[order])

    with torch.no_grad():
        for layer in range(arch.layers):
            for spec in arch.linears:
                permute(spec, decoder_linear(twin, arch, layer, spec))
    return twin


@pytest.mark.parametrize("kind", ["llama_gqa", "llama_mqa", "qwen2", "phi3", "gpt2"])
@pytest.mark.parametrize("name", SEEING)
def test_scores_follow_heads_and_channels_that_change_places(name: str, kind: str) -> None:
    model, arch = prepared(kind, seed=2)
    generator = torch.Generator().manual_seed(1)
    groups = torch.randperm(arch.kv_heads, generator=generator)
    channels = torch.randperm(arch.channels, generator=generator)
    per_group = arch.heads // arch.kv_heads
    inside = torch.stack([torch.randperm(per_group, generator=generator) for _ in range(arch.kv_heads)])
    heads = (groups[:, None] * per_group + inside).flatten()
    twin = reordered(model, arch, heads, channels)
    ids = torch.arange(2, 12)[None]
    with torch.no_grad():
        torch.testing.assert_close(
            twin(input_ids=ids).logits, model(input_ids=ids).logits, rtol=1e-4, atol=1e-5
        )
    backward(twin, seed=2)
    orders = {"kv_groups": groups, "channels": channels, "query_heads": heads}
    before, after = (observed(name, each, arch).scores() for each in (model, twin))
    for old, new in zip(before.layers, after.layers, strict=True):
        for part, order in orders.items():
            torch.testing.assert_close(getattr(new, part), getattr(old, part)[order], rtol=5e-3, atol=1e-6)


@pytest.mark.parametrize("name", CRITERIA.names())
def test_every_entry_is_a_documented_criterion(name: str) -> None:
    kind = CRITERIA.get(name)
    assert issubclass(kind, Criterion)
    assert kind.__doc__
    assert not inspect.isabstract(kind)
    assert kind.needs in get_args(Needs)
    assert issubclass(kind, ActivationCriterion) == (kind.needs == "activations")
    shared = ({"normalize": False}, {"chunk_elements": 7}) if name != "obs" else ({"damping": 0.1},)
    for options in shared:
        criterion = create_criterion(name, model_architecture(tiny_model("llama_mha")), **options)
        assert isinstance(criterion, kind)


def test_obs_has_one_unit_and_takes_no_normalisation() -> None:
    _, arch = prepared("llama_gqa")
    for options in ({"chunk_elements": 70}, {"normalize": False}):
        with pytest.raises(UsageError, match="takes neither"):
            create_criterion("obs", arch, **options)


@pytest.mark.parametrize("name", [name for name in SEEING if name != "obs"])
def test_the_chunk_does_not_matter_and_normalisation_does(name: str) -> None:
    model, arch = prepared("llama_gqa")
    ids = torch.randint(0, 128, (4, 9), generator=torch.Generator().manual_seed(0))
    found = []
    for options in ({}, {"chunk_elements": 70}, {"normalize": False}):
        criterion = create_criterion(name, arch, **options)
        if criterion.needs == "adapters":
            criterion.observe(model)
        else:
            collect(criterion, model, arch, ids, loss=summed_loss, batch=2)
        found.append(criterion.scores())
    for whole, chunked, raw in zip(*(scores.layers for scores in found), strict=True):
        for part in PARTS:
            torch.testing.assert_close(getattr(chunked, part), getattr(whole, part), rtol=1e-4, atol=1e-9)
            assert not torch.allclose(getattr(raw, part), getattr(whole, part), rtol=1e-3)


def test_listing_the_names_imports_no_torch() -> None:
    code = (
        "import sys; from compress.importance import CRITERIA; print(CRITERIA.names()); "
        "raise SystemExit('torch' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == str(CRITERIA.names())
    assert {"flap", "lora", "magnitude", "random", "taylor", "wanda"} <= set(CRITERIA.names())
