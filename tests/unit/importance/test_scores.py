"""Scores of whole models: against a dense recomputation, and through wrappers, fusions and narrow types."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from compress.errors import CompressError, UsageError
from compress.importance.base import GroupScores, create_criterion
from compress.importance.modules import decoder_linear, lora_factors, merged_rows, weight_rows
from compress.model.architecture import Architecture
from tests.tiny import tiny_model
from tests.unit.importance.common import dense_scores, matrices, vectors
from tests.unit.prune.common import backward, delta_of, model_architecture, with_lora

UNFUSED = ["llama_gqa", "llama_mqa", "llama_head_dim", "qwen2", "gemma2"]


def dense_lora_scores(model: Any, arch: Architecture, *, normalize: bool, first_order: bool) -> GroupScores:
    """The criterion written out with full matrices in float64 and loops over heads."""

    def importance(module: Any) -> torch.Tensor:
        a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
        ga, gb, a, b = (t.detach().double() for t in (a.grad, b.grad, a, b))
        estimate = gb @ a + b @ ga
        if not first_order:
            estimate = estimate - gb @ ga
        merged = module.base_layer.weight.detach().double() + module.scaling["default"] * b @ a
        return (estimate * merged) ** 2

    return dense_scores(matrices(model, arch, importance), arch, normalize=normalize)


@pytest.mark.parametrize("kind", UNFUSED)
@pytest.mark.parametrize(("normalize", "first_order"), [(True, False), (False, True)])
def test_lora_scores_equal_the_dense_formula(kind: str, normalize: bool, first_order: bool) -> None:
    model = tiny_model(kind)
    arch = model_architecture(model)
    peft_model = with_lora(model, arch)
    criterion = create_criterion(
        "lora", arch, normalize=normalize, first_order=first_order, chunk_elements=700
    )
    expected = torch.zeros(arch.layers * (arch.kv_heads + arch.channels + arch.heads), dtype=torch.float64)
    for seed in range(2):
        backward(peft_model, seed=seed)
        criterion.observe(peft_model)
        dense = dense_lora_scores(peft_model, arch, normalize=normalize, first_order=first_order)
        expected = 0.9 * expected + 0.1 * vectors(dense)
    torch.testing.assert_close(vectors(criterion.scores()), expected, rtol=1e-4, atol=0)


def test_normalised_scores_ignore_the_scale_of_the_loss_to_first_order() -> None:
    model = tiny_model("llama_gqa")
    arch = model_architecture(model)
    peft_model = with_lora(model, arch, scale=0.0)
    backward(peft_model, seed=0)
    first = create_criterion("lora", arch)
    first.observe(peft_model)
    for parameter in peft_model.parameters():
        if parameter.grad is not None:
            parameter.grad *= 8
    second = create_criterion("lora", arch)
    second.observe(peft_model)
    torch.testing.assert_close(vectors(first.scores()), vectors(second.scores()), rtol=1e-5, atol=0)


def test_steps_that_are_not_finite_are_skipped_and_counted() -> None:
    model = tiny_model("llama_mha")
    arch = model_architecture(model)
    peft_model = with_lora(model, arch)
    criterion = create_criterion("lora", arch)
    name = arch.module_name(1, arch.linears[-1])
    backward(peft_model, seed=0)
    factors = lora_factors(decoder_linear(peft_model, arch, 1, arch.linears[-1]), name)
    assert factors is not None
    assert factors.a.grad is not None
    good = factors.a.grad.clone()
    factors.a.grad[0, 0] = float("inf")
    criterion.observe(peft_model)
    assert (criterion.steps, criterion.skipped_steps) == (1, 1)
    with pytest.raises(CompressError, match="1 steps were seen, 1 of them not finite"):
        criterion.scores()
    factors.a.grad.copy_(good)
    criterion.observe(peft_model)
    before = vectors(criterion.scores())
    factors.a.grad[0, 0] = float("nan")
    criterion.observe(peft_model)
    assert (criterion.steps, criterion.skipped_steps) == (3, 2)
    assert torch.equal(vectors(criterion.scores()), before)


def test_state_restores_the_moving_average() -> None:
    model = tiny_model("llama_mha")
    arch = model_architecture(model)
    peft_model = with_lora(model, arch)
    whole, first, second = (create_criterion("lora", arch) for _ in range(3))
    for seed in range(4):
        backward(peft_model, seed=seed)
        whole.observe(peft_model)
        if seed == 2:
            second.load_state_dict(first.state_dict())
        (first if seed < 2 else second).observe(peft_model)
    assert torch.equal(vectors(whole.scores()), vectors(second.scores()))
    assert second.steps == 4


def fused_and_unfused() -> tuple[Any, Any]:
    """A Phi-3 model and a Llama model that compute the same function."""
    fused = tiny_model("phi3")
    config = fused.config
    shared = {
        name: getattr(config, name)
        for name in [
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "rms_norm_eps",
            "max_position_embeddings",
            "tie_word_embeddings",
            "bos_token_id",
            "eos_token_id",
            "pad_token_id",
        ]
    }
    twin = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shared)).eval()
    state = {}
    widths = [
        heads * config.hidden_size // config.num_attention_heads
        for heads in (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
    ]
    for name, tensor in fused.state_dict().items():
        if "qkv_proj" in name:
            for part, value in zip("qkv", tensor.split(widths), strict=True):
                state[name.replace("qkv_proj", f"{part}_proj")] = value
        elif "gate_up_proj" in name:
            for label, value in zip(("gate", "up"), tensor.chunk(2), strict=True):
                state[name.replace("gate_up_proj", f"{label}_proj")] = value
        else:
            state[name] = tensor
    twin.load_state_dict(state)
    ids = torch.arange(10)[None]
    torch.testing.assert_close(fused(ids).logits, twin(ids).logits)
    return fused, twin


def test_a_fused_model_scores_like_its_unfused_twin() -> None:
    fused, twin = fused_and_unfused()
    fused_arch, twin_arch = model_architecture(fused), model_architecture(twin)
    for options in ({"norm": "l1"}, {"norm": "l2"}, {"norm": "l2", "normalize": False}):
        found = []
        for model, arch in ((fused, fused_arch), (twin, twin_arch)):
            criterion = create_criterion("magnitude", arch, **options)
            criterion.observe(model)
            found.append(vectors(criterion.scores()))
        torch.testing.assert_close(*found)
    fused_lora, twin_lora = with_lora(fused, fused_arch, scale=0.0), with_lora(twin, twin_arch, scale=0.0)
    source = {"q": 0, "k": 0, "v": 0, "o": 1, "gate": 2, "up": 2, "down": 3}
    for layer in range(twin_arch.layers):  # with B = 0 the parts share A and nothing else
        for spec in twin_arch.linears:
            module: Any = decoder_linear(twin_lora, twin_arch, layer, spec)
            origin: Any = decoder_linear(fused_lora, fused_arch, layer, fused_arch.linears[source[spec.role]])
            module.lora_A["default"].weight.data.copy_(origin.lora_A["default"].weight)
    found = []
    for model, arch in ((fused_lora, fused_arch), (twin_lora, twin_arch)):
        backward(model, seed=5)
        criterion = create_criterion("lora", arch)
        criterion.observe(model)
        found.append(vectors(criterion.scores()))
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_magnitude_is_the_sum_over_the_slices_of_a_group(norm: str) -> None:
    model = tiny_model("llama_gqa")
    arch = model_architecture(model)
    criterion = create_criterion("magnitude", arch, norm=norm, normalize=False, chunk_elements=70)
    criterion.observe(model)
    for layer, block in zip(criterion.scores().layers, model.model.layers, strict=True):
        power = 1 if norm == "l1" else 2
        attn, mlp, hd = block.self_attn, block.mlp, arch.head_dim
        wide = hd * arch.heads // arch.kv_heads
        for g in range(arch.kv_heads):
            slices = [
                attn.q_proj.weight[g * wide : (g + 1) * wide],
                attn.k_proj.weight[g * hd : (g + 1) * hd],
                attn.v_proj.weight[g * hd : (g + 1) * hd],
                attn.o_proj.weight[:, g * wide : (g + 1) * wide],
            ]
            expected = sum(float(part.detach().double().abs().pow(power).sum()) for part in slices)
            assert float(layer.kv_groups[g]) == pytest.approx(expected, rel=1e-5)
        for h in range(arch.heads):
            slices = [
                attn.q_proj.weight[h * hd : (h + 1) * hd],
                attn.o_proj.weight[:, h * hd : (h + 1) * hd],
            ]
            expected = sum(float(part.detach().double().abs().pow(power).sum()) for part in slices)
            assert float(layer.query_heads[h]) == pytest.approx(expected, rel=1e-5)
        for c in (0, 7, arch.channels - 1):
            slices = [mlp.gate_proj.weight[c], mlp.up_proj.weight[c], mlp.down_proj.weight[:, c]]
            expected = sum(float(part.detach().double().abs().pow(power).sum()) for part in slices)
            assert float(layer.channels[c]) == pytest.approx(expected, rel=1e-5)


def test_magnitude_reads_bfloat16_weights_through_adapters() -> None:
    model = tiny_model("llama_gqa").to(torch.bfloat16)
    arch = model_architecture(model)
    wide = tiny_model("llama_gqa")
    wide.load_state_dict({name: tensor.float() for name, tensor in model.state_dict().items()})
    expected = create_criterion("magnitude", arch)
    expected.observe(wide)
    plain = create_criterion("magnitude", arch)
    plain.observe(model)
    assert torch.equal(vectors(plain.scores()), vectors(expected.scores()))

    zero = with_lora(model, arch, scale=0.0)
    wrapped = create_criterion("magnitude", arch)
    wrapped.observe(zero)
    torch.testing.assert_close(vectors(wrapped.scores()), vectors(expected.scores()), rtol=1e-6, atol=0)

    trained = with_lora(wide, arch)
    adapted = create_criterion("magnitude", arch)
    adapted.observe(trained)
    merged = create_criterion("magnitude", arch)
    merged.observe(trained.merge_and_unload())
    torch.testing.assert_close(vectors(adapted.scores()), vectors(merged.scores()), rtol=1e-5, atol=0)
    assert not torch.allclose(vectors(adapted.scores()), vectors(expected.scores()), rtol=1e-3)


def test_transposed_linears_are_read_as_out_by_in() -> None:
    model = tiny_model("gpt2")
    arch = model_architecture(model)
    peft_model = with_lora(model, arch)
    backward(peft_model, seed=0)
    criterion = create_criterion("lora", arch)
    criterion.observe(peft_model)
    for index, layer in enumerate(criterion.scores().layers):
        mlp = peft_model.get_base_model().transformer.h[index].mlp
        total = torch.zeros(arch.channels, dtype=torch.float64)
        for module, axis in ((mlp.c_fc, 1), (mlp.c_proj, 0)):
            a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
            ga, gb, a, b = (t.detach().double() for t in (a.grad, b.grad, a, b))
            weight = module.base_layer.weight.detach().double().T + module.scaling["default"] * b @ a
            vector = ((gb @ a + b @ ga - gb @ ga) * weight).square().sum(axis)
            total += vector / vector.norm()
        torch.testing.assert_close(layer.channels, 0.1 * total, rtol=1e-4, atol=0)
        assert layer.kv_groups.tolist() == [0.0] * arch.kv_heads
        assert layer.query_heads.tolist() == [0.0] * arch.heads


def test_weights_are_read_in_place_and_adapters_added() -> None:
    model = tiny_model("llama_mha")
    arch = model_architecture(model)
    spec = arch.linears[0]
    stored = model.model.layers[0].self_attn.q_proj.weight.detach()
    whole = slice(0, len(stored))
    rows = weight_rows(decoder_linear(model, arch, 0, spec), spec, "q")
    assert rows.rows(whole).data_ptr() == stored.data_ptr()
    assert (rows.shape, rows.dtype) == (tuple(stored.shape), torch.float32)
    assert (
        merged_rows(decoder_linear(model, arch, 0, spec), spec, "q").rows(whole).data_ptr()
        == stored.data_ptr()
    )
    peft_model = with_lora(model, arch)
    wrapped = decoder_linear(peft_model, arch, 0, spec)
    assert torch.equal(weight_rows(wrapped, spec, "q").rows(whole), stored)
    expected = stored + delta_of(peft_model, arch, 0, spec)
    torch.testing.assert_close(merged_rows(wrapped, spec, "q").rows(slice(3, 9)), expected[3:9])


def test_codes_are_not_taken_for_weights() -> None:
    model = tiny_model("llama_mha")
    arch = model_architecture(model)
    linear = model.model.layers[1].mlp.down_proj
    linear.weight = torch.nn.Parameter(linear.weight.to(torch.uint8), requires_grad=False)
    with pytest.raises(CompressError, match=r"model.layers.1.mlp.down_proj is quantized \(uint8 codes\)"):
        create_criterion("magnitude", arch).observe(model)


def test_scores_of_an_earlier_version_are_refused() -> None:
    arch = model_architecture(tiny_model("llama_mha"))
    tensors = create_criterion("random", arch).scores().to_tensors()
    assert torch.equal(
        vectors(GroupScores.from_tensors(tensors)), vectors(create_criterion("random", arch).scores())
    )
    del tensors["layers.1.query_heads"]
    with pytest.raises(CompressError, match=r"lack layers.1.query_heads"):
        GroupScores.from_tensors(tensors)


def test_missing_adapters_gradients_and_options_are_named() -> None:
    model = tiny_model("llama_mha")
    arch = model_architecture(model)
    criterion = create_criterion("lora", arch)
    with pytest.raises(CompressError, match=r"needs an unmerged adapter on model.layers.0.self_attn.q_proj"):
        criterion.observe(model)
    peft_model = with_lora(model, arch)
    with pytest.raises(CompressError, match="has no gradient"):
        criterion.observe(peft_model)
    for options in ({"norm": "l3"}, {"power": 2}, {"chunk_elements": 0}):
        with pytest.raises(UsageError):
            create_criterion("magnitude", arch, **options)
    for wrong in ({"momentum": 1.0}, {"element": "cube"}):
        with pytest.raises(UsageError):
            create_criterion("lora", arch, **wrong)
    with pytest.raises(UsageError, match="Choose element or vector"):
        create_criterion("taylor", arch, form="matrix")
    with pytest.raises(UsageError, match=r"flap, lora, magnitude, .*random, taylor, wanda"):
        create_criterion("wisdom", arch)
