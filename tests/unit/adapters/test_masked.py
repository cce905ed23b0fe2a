"""The masked product: outputs and gradients against the dense formula, and what training leaves zero."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compress.adapters.attach import attach_lora, load_adapter, lora_delta, save_adapter
from compress.adapters.masked import MaskedWeights, _MaskedProduct, mask_adapters
from compress.adapters.train import fit
from compress.errors import CompressError
from compress.prune.weight_masks import WeightMasks, pack_bits
from tests.tiny import tiny_model
from tests.unit.adapters.test_align import CONFIG, released
from tests.unit.adapters.test_train import windows
from tests.unit.prune.common import model_architecture


def random_masks(model: Any, arch: Any, seed: int = 0) -> WeightMasks:
    """Half of the weights of every linear of the first layer."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {arch.module_name(0, spec): arch.linear_shape(spec) for spec in arch.linears}
    return WeightMasks(
        pattern="unstructured",
        packed={n: pack_bits(torch.rand(s, generator=generator) > 0.5) for n, s in shapes.items()},
        columns={n: s[1] for n, s in shapes.items()},
    )


def adapted(kind: str = "llama_gqa") -> tuple[Any, WeightMasks]:
    model = tiny_model(kind)
    arch = model_architecture(model)
    masks = random_masks(model, arch)
    peft_model = attach_lora(model, arch, rank=3, alpha=5, dropout=0.0, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return peft_model, masks


@given(st.integers(1, 4), st.integers(1, 9), st.integers(1, 5), st.integers(1, 3), st.integers(0, 2**20))
def test_output_and_gradients_are_those_of_the_dense_formula(
    tokens: int, into: int, out: int, rank: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, a, b = (
        torch.randn(s, generator=generator, dtype=torch.float64, requires_grad=True)
        for s in ((2, tokens, into), (rank, into), (out, rank))
    )
    mask = torch.rand(out, into, generator=generator) > 0.5
    ours = _MaskedProduct.apply(x, a, b, pack_bits(mask))
    dense = x @ ((b @ a) * mask).T
    upstream = torch.randn(ours.shape, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(ours, dense)
    torch.testing.assert_close(
        torch.autograd.grad(ours, (x, a, b), upstream), torch.autograd.grad(dense, (x, a, b), upstream)
    )


@pytest.mark.parametrize("kind", ["llama_gqa", "phi3", "gpt2"])
def test_the_model_computes_with_the_masked_product(kind: str, tmp_path: Path) -> None:
    """Against a model whose weights have the masked delta added by hand; also from the saved adapter."""
    peft_model, masks = adapted(kind)
    plain = tiny_model(kind)
    arch = model_architecture(plain)
    for layer in range(arch.layers):
        for spec in arch.linears:
            name = arch.module_name(layer, spec)
            delta, mask = lora_delta(peft_model, name), masks.mask(name)
            assert delta is not None
            delta = delta if mask is None else delta * mask
            with torch.no_grad():
                plain.get_submodule(name).weight.add_(delta.T if spec.transposed else delta)
    ids = torch.randint(0, 128, (2, 9), generator=torch.Generator().manual_seed(0))
    unmasked = peft_model(ids).logits
    mask_adapters(peft_model, masks)
    torch.testing.assert_close(peft_model(ids).logits, plain(ids).logits, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(unmasked, plain(ids).logits, atol=1e-2)
    save_adapter(peft_model, tmp_path, base_name="base")
    masks.save(tmp_path / "masks.safetensors")
    again = load_adapter(tiny_model(kind), tmp_path)
    torch.testing.assert_close(again(ids).logits, plain(ids).logits, rtol=1e-4, atol=1e-5)


def test_it_trains_in_bfloat16_too() -> None:
    peft_model, masks = adapted()
    mask_adapters(peft_model, masks)
    losses = fit(peft_model, windows(), replace(CONFIG, steps=12, lr=1e-2, precision="bfloat16")).losses
    assert losses[-1] < losses[0]


def test_a_mask_of_another_shape_is_refused() -> None:
    peft_model, masks = adapted()
    name = next(iter(masks.packed))
    wrong = replace(masks, packed={name: masks.packed[name][:-1]})
    with pytest.raises(CompressError, match=f"The mask of {name} is for"):
        mask_adapters(peft_model, wrong)


@pytest.mark.parametrize("kind", ["llama_gqa", "gpt2"])
def test_thinned_weights_stay_zero_in_alignment(kind: str) -> None:
    model = released(kind)
    arch = model_architecture(model)
    masks, turned = random_masks(model, arch), kind == "gpt2"
    modules = {name: model.get_submodule(name) for name in masks.packed}
    stored = {n: m.T if turned else m for n in modules if (m := masks.mask(n)) is not None}
    with torch.no_grad():
        for name, module in modules.items():
            module.weight.mul_(stored[name])
    before = {name: module.weight.detach().clone() for name, module in modules.items()}
    fit(model, windows(), CONFIG, hooks=[MaskedWeights(model, masks, transposed=turned)])
    for name, module in modules.items():
        assert (module.weight[~stored[name]] == 0).all()
        assert (module.weight != before[name]).any()
