"""Wanda-sp and FLAP against whole matrices and whole inputs in float64."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compress.errors import CompressError, UsageError
from compress.importance.activations import Moments
from compress.importance.base import GroupScores, create_criterion
from compress.importance.collect import collect
from compress.model.architecture import Architecture
from tests.tiny import tiny_model
from tests.unit.importance.common import dense_scores, linear_inputs, matrices, vectors
from tests.unit.prune.common import model_architecture, with_lora

KINDS = ["llama_gqa", "llama_mqa", "llama_head_dim", "qwen3", "gemma2", "phi3", "gpt2"]


def text(seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 128, (5, 9), generator=torch.Generator().manual_seed(seed))


def reference(
    name: str, model: Any, arch: Architecture, ids: torch.Tensor, *, normalize: bool
) -> GroupScores:
    """From one forward pass over the whole text, in float64."""
    model = copy.deepcopy(model).double()
    turned = model.config.model_type == "gpt2"
    weights = matrices(model, arch, lambda module: module.weight.T if turned else module.weight)
    inputs = linear_inputs(model, arch, ids)
    elements = []
    for weight, x in zip(weights, inputs, strict=True):
        if name == "wanda":
            elements.append({role: w.abs() * x[role].square().sum(0).sqrt() for role, w in weight.items()})
        else:
            elements.append(
                {role: w**2 * x[role].var(dim=0) for role, w in weight.items() if role in ("o", "down")}
            )
    return dense_scores(elements, arch, normalize=normalize)


@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=5),
    st.integers(1, 4),
    st.sampled_from([0.0, 1.0, 300.0]),
    st.integers(0, 10_000),
)
def test_moments_are_those_of_all_tokens(counts: list[int], features: int, offset: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.randn(count, features, generator=generator) + offset for count in counts]
    moments = Moments()
    for part in parts:
        moments.add(part)
    whole = torch.cat(parts).double()
    assert moments.tokens == len(whole)
    torch.testing.assert_close(moments.norm, whole.norm(dim=0), rtol=1e-6, atol=0)
    expected = whole.var(dim=0) if len(whole) > 1 else torch.zeros(features, dtype=torch.float64)
    torch.testing.assert_close(moments.variance, expected, rtol=1e-4, atol=1e-8 * (1 + offset**2))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["wanda", "flap"])
@pytest.mark.parametrize("normalize", [True, False])
def test_scores_equal_the_formula_on_whole_matrices(name: str, kind: str, normalize: bool) -> None:
    model = tiny_model(kind)
    arch = model_architecture(model)
    criterion = create_criterion(name, arch, normalize=normalize, chunk_elements=200)
    collect(criterion, model, arch, text(), loss=None, batch=2)
    expected = reference(name, model, arch, text(), normalize=normalize)
    torch.testing.assert_close(vectors(criterion.scores()), vectors(expected), rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("kind", ["llama_gqa", "phi3"])
def test_wanda_can_look_at_the_outputs_alone(kind: str) -> None:
    model = tiny_model(kind)
    arch = model_architecture(model)
    criterion = create_criterion("wanda", arch, linears="outputs", normalize=False)
    collect(criterion, model, arch, text(), loss=None, batch=5)
    inputs: dict[tuple[int, str], list[torch.Tensor]] = {}

    def watch(key: tuple[int, str]) -> Any:
        return lambda _, args: inputs.setdefault(key, []).append(args[0].flatten(0, -2).double())

    places = [
        (layer, spec) for layer in range(arch.layers) for spec in arch.linears if spec.role in ("o", "down")
    ]
    for layer, spec in places:
        module = model.get_submodule(arch.module_name(layer, spec))
        module.register_forward_pre_hook(watch((layer, spec.role)))
    with torch.no_grad():
        model(text())
    for layer, spec in places:
        weight = model.get_submodule(arch.module_name(layer, spec)).weight.detach().double()
        columns = weight.abs().sum(dim=0) * torch.cat(inputs[layer, spec.role]).norm(dim=0)
        scores = criterion.scores().layers[layer]
        found = scores.kv_groups if spec.role == "o" else scores.channels
        torch.testing.assert_close(found, columns.view(len(found), -1).sum(dim=1), rtol=1e-4, atol=1e-9)
    with pytest.raises(UsageError, match="no linears 'some'"):
        create_criterion("wanda", arch, linears="some")


@pytest.mark.parametrize("kind", ["llama_gqa", "llama_mqa"])
def test_flap_can_be_standardised_per_layer_and_kind(kind: str) -> None:
    model = tiny_model(kind)
    arch = model_architecture(model)
    raw = create_criterion("flap", arch, normalize=False)
    standard = create_criterion("flap", arch, standardize=True)
    for criterion in (raw, standard):
        collect(criterion, model, arch, text(), loss=None, batch=5)
    for plain, scaled in zip(raw.scores().layers, standard.scores().layers, strict=True):
        for part in ("kv_groups", "channels", "query_heads"):
            values, found = getattr(plain, part), getattr(scaled, part)
            if len(values) == 1:
                assert found.tolist() == [0.0]
            else:
                expected = (values - values.mean()) / values.std(correction=0)
                torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    restored = create_criterion("flap", arch, standardize=True)
    restored.load_state_dict(standard.state_dict())
    assert torch.equal(vectors(restored.scores()), vectors(standard.scores()))


@pytest.mark.parametrize("name", ["wanda", "flap"])
def test_adapters_count_as_part_of_the_weight(name: str) -> None:
    model = tiny_model("llama_gqa")
    arch = model_architecture(model)
    wrapped = with_lora(model, arch)
    adapted, merged = create_criterion(name, arch), create_criterion(name, arch)
    collect(adapted, wrapped, arch, text(), loss=None, batch=5)
    collect(merged, wrapped.merge_and_unload(), arch, text(), loss=None, batch=5)
    torch.testing.assert_close(vectors(adapted.scores()), vectors(merged.scores()), rtol=1e-4, atol=1e-9)


def test_watching_ends_with_its_block_and_blocks_add_up() -> None:
    model = tiny_model("llama_gqa")
    arch = model_architecture(model)
    criterion, whole = create_criterion("wanda", arch), create_criterion("wanda", arch)
    with pytest.raises(CompressError, match=r"No inputs of model.layers.0.self_attn.q_proj were gathered"):
        criterion.observe(model)
    for part in (text()[:2], text()[2:]):
        with torch.no_grad(), criterion.watching(model):
            model(input_ids=part)
        model(input_ids=text(1))  # nobody watches
    criterion.observe(model)
    collect(whole, model, arch, text(), loss=None, batch=5)
    torch.testing.assert_close(vectors(criterion.scores()), vectors(whole.scores()), rtol=1e-5, atol=0)
    with pytest.raises(CompressError, match="were gathered"):
        criterion.observe(model)  # an observation uses the inputs up
    with pytest.raises(ZeroDivisionError), criterion.watching(model):
        1 / 0  # noqa: B018
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_inputs_that_are_not_finite_are_counted() -> None:
    model = tiny_model("llama_gqa")
    arch = model_architecture(model)
    with torch.no_grad():
        model.model.embed_tokens.weight[7, 0] = float("inf")
    criterion = create_criterion("flap", arch)
    collect(criterion, model, arch, torch.full((1, 4), 7), loss=None, batch=1)
    assert (criterion.steps, criterion.skipped_steps) == (1, 1)
    with pytest.raises(CompressError, match="1 of them not finite"):
        criterion.scores()
