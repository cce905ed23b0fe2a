"""The 8-bit frozen base against its dequantized twin."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from compress.adapters.attach import attach_lora
from compress.errors import CompressError
from compress.importance.base import Criterion, create_criterion
from compress.importance.collect import collect
from compress.model.architecture import Architecture
from compress.model.int8 import Int8Linear, int8_rows, to_int8
from tests.tiny import tiny_model
from tests.unit.importance.common import vectors
from tests.unit.prune.common import backward, model_architecture, with_lora


def layer(seed: int = 0, *, bias: bool = True, dtype: torch.dtype = torch.float32) -> Int8Linear:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(37, 53, generator=generator) * torch.rand(37, 1, generator=generator)
    offset = nn.Parameter(torch.randn(37, generator=generator).to(dtype)) if bias else None
    return Int8Linear(weight.to(dtype), offset)


def dense(of: Int8Linear, dtype: torch.dtype) -> nn.Linear:
    twin = nn.Linear(of.in_features, of.out_features, bias=of.bias is not None, dtype=dtype)
    twin.weight = nn.Parameter(of.rows(slice(None)).to(dtype))
    if of.bias is not None:
        twin.bias = nn.Parameter(of.bias.detach().to(dtype))
    return twin


def inputs(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(2, 7, 53, generator=torch.Generator().manual_seed(9)).to(dtype).requires_grad_()


def dequantized(model: nn.Module) -> Any:
    """A copy of an 8-bit model with ordinary linears that hold the dequantized weights."""
    twin = copy.deepcopy(model)
    for name, module in list(twin.named_modules()):
        if isinstance(module, Int8Linear):
            parent, _, attribute = name.rpartition(".")
            setattr(twin.get_submodule(parent), attribute, dense(module, torch.float32))
    return twin


def eight_bit(kind: str) -> tuple[Any, Architecture]:
    model = tiny_model(kind)
    arch = model_architecture(model)
    to_int8(model, arch)
    return model, arch


@given(
    st.integers(1, 9),
    st.integers(1, 40),
    st.sampled_from([1e-43, 1e-38, 1e-20, 1.0, 1e30]),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    st.integers(0, 10_000),
)
def test_every_element_is_the_nearest_step(
    out: int, inner: int, size: float, dtype: torch.dtype, seed: int
) -> None:
    weight = (torch.randn(out, inner, generator=torch.Generator().manual_seed(seed)) * size).to(dtype)
    weight[0] = 0
    codes, scale = int8_rows(weight)
    assert (codes.dtype, scale.dtype, codes.shape, scale.shape) == (
        torch.int8,
        torch.float32,
        (out, inner),
        (out,),
    )
    assert int(codes.abs().max()) <= 127
    wide = weight.double()
    largest = wide.abs().amax(dim=1, keepdim=True)
    error = (codes.double() * scale.double()[:, None] - wide).abs()
    rounding = 127 * 2**-149  # of a subnormal scale, times the largest code
    assert bool((error <= largest / 254 * (1 + 1e-5) + rounding).all())
    assert codes[0].tolist() == [0] * inner
    normal = (largest > 1e-36).flatten()
    assert bool((codes.abs().amax(dim=1)[normal] == 127).all())
    torch.testing.assert_close(scale[normal].double(), largest[normal, 0] / 127, rtol=1e-6, atol=0)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_output_and_gradient_equal_those_of_the_dense_layer(dtype: torch.dtype, bias: bool) -> None:
    small = layer(bias=bias, dtype=dtype)
    twin = dense(small, dtype)
    x, y = inputs(dtype), inputs(dtype)
    out, expected = small(x), twin(y)
    assert out.dtype == dtype
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype.itemsize > 2 else {"rtol": 0.02, "atol": 0.05}
    torch.testing.assert_close(out, expected, **tolerance)
    out.float().square().sum().backward()
    expected.float().square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=tolerance["rtol"], atol=20 * tolerance["atol"])
    if bias:
        assert small.bias is not None
        torch.testing.assert_close(small.bias.grad, twin.bias.grad, rtol=0.05, atol=20 * tolerance["atol"])
    assert small.weight.grad is None


def test_gradients_against_finite_differences() -> None:
    small = layer(bias=False, dtype=torch.float64)
    x = inputs(torch.float64)[0, :2].detach().requires_grad_()
    assert torch.autograd.gradcheck(small, (x,))


def test_no_dequantized_weight_is_kept_for_the_backward_pass() -> None:
    kept: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    small = layer(bias=False)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        small(inputs()).sum()
    assert [(t.dtype, t.shape) for t in kept] == [(torch.int8, (37, 53)), (torch.float32, (37,))]
    stored = {small.weight.data_ptr(), small.scale_bits.data_ptr()}
    assert {tensor.data_ptr() for tensor in kept} == stored


def test_autocast_decides_the_compute_type() -> None:
    small = layer()
    x = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        out = small(x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), dense(small, torch.float32)(x), rtol=0.05, atol=0.1)
    out.float().sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_casts_change_neither_codes_nor_scales(dtype: torch.dtype) -> None:
    small = layer()
    before = small.rows(slice(None))
    model = nn.Sequential(small, nn.Linear(37, 3)).to(dtype)
    assert (small.weight.dtype, small.scale.dtype) == (torch.int8, torch.float32)
    assert torch.equal(small.rows(slice(None)), before)
    assert torch.equal(small.half().float().rows(slice(5, 9)), before[5:9])
    assert model.to(dtype)(inputs(dtype)).dtype == dtype


def test_state_dicts_and_copies_round_trip() -> None:
    small, other = layer(), layer(seed=1)
    other.load_state_dict(small.state_dict())
    assert torch.equal(other(inputs()), small(inputs()))
    assert torch.equal(copy.deepcopy(small)(inputs()), small(inputs()))
    assert [name for name, p in small.named_parameters() if p.requires_grad] == ["bias"]
    assert {t.device.type for t in small.to("meta").state_dict().values()} == {"meta"}


@pytest.mark.parametrize("kind", ["llama_gqa", "qwen2", "phi3"])
def test_a_model_in_8_bit_is_the_dequantized_model(kind: str) -> None:
    model, arch = eight_bit(kind)
    original, twin = tiny_model(kind), dequantized(model)
    count = sum(isinstance(module, Int8Linear) for module in model.modules())
    assert count == arch.layers * len(arch.linears)
    size = sum(m.weight.nbytes + m.scale.nbytes for m in model.modules() if isinstance(m, Int8Linear))
    rows = arch.layers * sum(arch.linear_shape(spec)[0] for spec in arch.linears)
    assert size == arch.decoder_linear_parameters() + 4 * rows
    ids = torch.arange(2, 22)[None]
    torch.testing.assert_close(model(ids).logits, twin(ids).logits, rtol=1e-4, atol=1e-5)
    whole = original(ids).logits.detach()
    assert 1e-4 < float((model(ids).logits.detach() - whole).norm() / whole.norm()) < 0.03


def test_linears_change_one_at_a_time_and_in_place() -> None:
    model = tiny_model("qwen2")
    arch = model_architecture(model)
    bias = model.model.layers[0].self_attn.q_proj.bias
    head = model.lm_head
    to_int8(model.train(), arch)
    replaced = model.model.layers[0].self_attn.q_proj
    assert replaced.bias is bias
    assert replaced.training
    assert model.lm_head is head
    assert type(head) is nn.Linear


def scored(name: str, model: Any, arch: Architecture, **options: Any) -> Criterion:
    criterion = create_criterion(name, arch, chunk_elements=300, **options)
    ids = torch.randint(0, 128, (4, 10), generator=torch.Generator().manual_seed(0))
    if name == "lora":
        model = with_lora(model, arch)
        for seed in range(2):
            backward(model, seed=seed)
            criterion.observe(model)
    else:
        collect(criterion, model, arch, ids, loss=None, batch=2)
    return criterion


@pytest.mark.parametrize("kind", ["llama_gqa", "phi3"])
@pytest.mark.parametrize("name", ["lora", "magnitude", "wanda", "flap"])
def test_scores_are_those_of_the_dequantized_weights(name: str, kind: str) -> None:
    model, arch = eight_bit(kind)
    twin, original = dequantized(model), tiny_model(kind)
    found = vectors(scored(name, model, arch).scores())
    torch.testing.assert_close(found, vectors(scored(name, twin, arch).scores()), rtol=1e-3, atol=1e-6)
    assert not torch.equal(found, vectors(scored(name, original, arch).scores()))


def test_weight_scores_are_bit_equal() -> None:
    model, arch = eight_bit("llama_gqa")
    twin = dequantized(model)
    assert torch.equal(
        vectors(scored("magnitude", model, arch).scores()), vectors(scored("magnitude", twin, arch).scores())
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lora_trains_on_an_8_bit_base(dtype: torch.dtype) -> None:
    model = tiny_model("llama_gqa").to(dtype)
    arch = model_architecture(model)
    to_int8(model, arch)
    codes = {name: m.weight.clone() for name, m in model.named_modules() if isinstance(m, Int8Linear)}
    adapted: Any = attach_lora(model, arch, rank=4, dropout=0.0)
    trainable = [p for p in adapted.parameters() if p.requires_grad]
    assert {p.dtype for p in trainable} == {torch.float32}
    assert len(trainable) == 2 * len(codes)
    optimizer = torch.optim.AdamW(trainable, lr=0.01)
    ids = torch.randint(0, 128, (2, 12), generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(8):
        loss = adapted(input_ids=ids, labels=ids).loss
        losses.append(float(loss.detach()))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.1
    for name, stored in codes.items():
        assert torch.equal(model.get_submodule(name).get_submodule("base_layer").weight, stored)


def test_what_cannot_be_stored_in_8_bit_is_refused() -> None:
    gpt2 = tiny_model("gpt2")
    with pytest.raises(CompressError, match="is a Conv1D, which has no 8-bit form"):
        to_int8(gpt2, model_architecture(gpt2))
    twice, arch = eight_bit("llama_gqa")
    with pytest.raises(CompressError, match="is a Int8Linear"):
        to_int8(twice, arch)
    mixed = tiny_model("llama_gqa")
    mixed.model.layers[1].mlp.down_proj = Int8Linear(mixed.model.layers[1].mlp.down_proj.weight)
    with pytest.raises(CompressError, match=r"model.layers.1.mlp.down_proj"):
        to_int8(mixed, arch)
    assert type(mixed.model.layers[0].mlp.down_proj) is nn.Linear  # checked before anything is changed
    broken = tiny_model("llama_gqa")
    with torch.no_grad():
        broken.model.layers[0].mlp.up_proj.weight[3, 3] = float("inf")
    with pytest.raises(CompressError, match=r"model.layers.0.mlp.up_proj is not finite"):
        to_int8(broken, arch)
