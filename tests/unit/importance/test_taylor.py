"""Taylor importance against autograd on whole matrices in float64."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from compress.errors import CompressError
from compress.importance.base import GroupScores, create_criterion
from compress.importance.collect import collect
from compress.model.architecture import Architecture
from tests.tiny import tiny_model
from tests.unit.importance.common import dense_scores, matrices, vectors
from tests.unit.prune.common import model_architecture, with_lora

KINDS = ["llama_gqa", "llama_mqa", "llama_head_dim", "qwen2", "gemma2", "phi3", "gpt2"]


def text(seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 128, (5, 9), generator=torch.Generator().manual_seed(seed))


def summed_loss(model: Any, ids: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=ids).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")


def reference(
    model: Any, arch: Architecture, ids: torch.Tensor, *, form: str, normalize: bool
) -> GroupScores:
    """From one backward pass over the whole text, the mean loss, in float64."""
    model = copy.deepcopy(model).double().requires_grad_(True)
    (summed_loss(model, ids) / (ids.shape[0] * (ids.shape[1] - 1))).backward()

    def product(module: Any) -> torch.Tensor:
        value: torch.Tensor = module.weight * module.weight.grad
        return value.T if model.config.model_type == "gpt2" else value

    elements = matrices(model, arch, product)
    if form == "vector":
        return dense_scores(elements, arch, normalize=normalize, reduce=lambda part: part.sum().abs())
    return dense_scores(elements, arch, normalize=normalize, reduce=lambda part: part.abs().sum())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("form", "normalize"), [("element", True), ("vector", True), ("vector", False)])
def test_scores_equal_autograd_on_whole_matrices(kind: str, form: str, normalize: bool) -> None:
    model = tiny_model(kind).double()
    arch = model_architecture(model)
    ids = text()
    criterion = create_criterion("taylor", arch, form=form, normalize=normalize, chunk_elements=200)
    collect(criterion, model, arch, ids, loss=summed_loss, batch=2)
    expected = reference(model, arch, ids, form=form, normalize=normalize)
    torch.testing.assert_close(vectors(criterion.scores()), vectors(expected), rtol=1e-9, atol=1e-15)


def test_float32_is_enough() -> None:
    model = tiny_model("llama_gqa")
    arch = model_architecture(model)
    criterion = create_criterion("taylor", arch)
    collect(criterion, model, arch, text(), loss=summed_loss, batch=2)
    expected = reference(model, arch, text(), form="element", normalize=True)
    torch.testing.assert_close(vectors(criterion.scores()), vectors(expected), rtol=1e-3, atol=0)


def test_the_vector_form_is_the_slope_of_the_loss_along_a_slice() -> None:
    model = tiny_model("llama_gqa").double()
    arch = model_architecture(model)
    criterion = create_criterion("taylor", arch, form="vector", normalize=False)
    collect(criterion, model, arch, text(), loss=summed_loss, batch=5)
    total = 0.0
    for name, axis in (("gate", 0), ("up", 0), ("down", 1)):
        key = f"model.layers.1.mlp.{name}_proj.weight"
        weight = model.get_parameter(key).detach()
        factor = torch.ones((), dtype=torch.float64, requires_grad=True)
        ones = torch.ones(arch.channels, dtype=torch.float64)
        scale = torch.where(torch.arange(arch.channels) == 17, factor, ones).unsqueeze(1 - axis)
        logits = torch.func.functional_call(model, {key: weight * scale}, (text(),)).logits[:, :-1]
        F.cross_entropy(logits.flatten(0, 1), text()[:, 1:].flatten()).backward()
        assert factor.grad is not None
        total += abs(float(factor.grad))
    assert float(criterion.scores().layers[1].channels[17]) == pytest.approx(total, rel=1e-9)


def test_observations_are_added() -> None:
    model = tiny_model("llama_gqa")
    arch = model_architecture(model)
    both = create_criterion("taylor", arch)
    total = torch.zeros(())
    for seed in (1, 2):
        collect(both, model, arch, text(seed), loss=summed_loss, batch=5)
        alone = create_criterion("taylor", arch)
        collect(alone, model, arch, text(seed), loss=summed_loss, batch=5)
        total = total + vectors(alone.scores())
    assert both.steps == 2
    torch.testing.assert_close(vectors(both.scores()), total)


def test_adapters_count_as_part_of_the_weight() -> None:
    model = tiny_model("llama_gqa")
    arch = model_architecture(model)
    wrapped = with_lora(model, arch)
    adapted, merged = create_criterion("taylor", arch), create_criterion("taylor", arch)
    collect(adapted, wrapped, arch, text(), loss=summed_loss, batch=5)
    collect(merged, wrapped.merge_and_unload(), arch, text(), loss=summed_loss, batch=5)
    torch.testing.assert_close(vectors(adapted.scores()), vectors(merged.scores()), rtol=1e-3, atol=0)


def test_gradients_that_are_not_finite_are_counted() -> None:
    model = tiny_model("llama_gqa")
    arch = model_architecture(model)
    criterion = create_criterion("taylor", arch)
    with pytest.raises(CompressError, match=r"model.layers.0.self_attn.q_proj has no gradient"):
        criterion.observe(model)
    summed_loss(model, text()).backward()
    model.model.layers[1].mlp.up_proj.weight.grad[3, 3] = float("nan")
    criterion.observe(model)
    assert (criterion.steps, criterion.skipped_steps) == (1, 1)
    with pytest.raises(CompressError, match="1 of them not finite"):
        criterion.scores()
