"""Declared families: names, shapes, and configs of smaller models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from compress.errors import CompressError
from compress.model.architecture import (
    Architecture,
    LinearSpec,
    accepted_kv_heads,
    architecture_of,
    expected_shapes,
    resized_config,
)
from compress.model.family import FAMILIES
from tests.tiny import DENSE, TINY, tiny_model


def config_of(kind: str) -> dict[str, Any]:
    config: dict[str, Any] = TINY[kind]().to_dict()
    return config


def resized(kind: str, kv_heads: int, channels: int) -> tuple[dict[str, Any], Architecture]:
    config = config_of(kind)
    arch = architecture_of(config)
    heads = kv_heads * arch.queries_per_group
    return resized_config(config, arch, heads=heads, kv_heads=kv_heads, channels=channels), arch


@pytest.mark.parametrize("kind", DENSE)
def test_names_and_shapes_are_those_of_the_real_model(kind: str) -> None:
    model = tiny_model(kind)
    parameters = dict(model.named_parameters())
    arch = architecture_of(model.config.to_dict(), parameters)
    shapes = expected_shapes(arch)
    for name, shape in shapes.items():
        assert tuple(parameters[name].shape) == shape
    linears = {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"}
    assert linears == {arch.module_name(i, s) for i in range(arch.layers) for s in arch.linears}
    weights = sum(model.get_submodule(name).weight.numel() for name in linears)
    assert arch.decoder_linear_parameters() == weights
    assert {f"{n}.bias" for n in linears} & set(parameters) == {n for n in shapes if n.endswith(".bias")}
    assert arch.tied == (model.lm_head.weight is model.get_input_embeddings().weight)


def test_every_declared_family_has_a_tiny_model() -> None:
    covered = {TINY[kind]().model_type.replace("_", "-") for kind in DENSE}
    assert set(FAMILIES.names()) == covered


def test_head_dim_comes_from_the_config() -> None:
    assert architecture_of(config_of("llama_head_dim")).head_dim == 16
    assert architecture_of(config_of("llama_mha")).head_dim == 8
    explicit = config_of("llama_mha")
    del explicit["head_dim"], explicit["num_key_value_heads"]
    arch = architecture_of(explicit)
    assert (arch.head_dim, arch.kv_heads) == (8, 4)


def test_biases_follow_the_config() -> None:
    config = config_of("llama_gqa") | {"attention_bias": True, "mlp_bias": True}
    assert all(spec.bias for spec in architecture_of(config).linears)
    assert [s.role for s in architecture_of(config_of("qwen2")).linears if s.bias] == ["q", "k", "v"]


def test_transposed_linears_are_stored_the_other_way() -> None:
    arch = architecture_of(config_of("llama_gqa"))
    up = LinearSpec(name="up", role="up", transposed=True)
    assert arch.linear_shape(up) == (96, 64)
    assert arch.stored_shape(up) == (64, 96)


@pytest.mark.parametrize("kind", DENSE)
def test_resized_config_builds_exactly_the_pruned_shapes(kind: str) -> None:
    for kv_heads in accepted_kv_heads(config_of(kind), architecture_of(config_of(kind))):
        config, arch = resized(kind, kv_heads, 40)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
        small = architecture_of(config, dict(model.named_parameters()))
        assert (small.kv_heads, small.channels, small.head_dim) == (kv_heads, 40, arch.head_dim)
        assert small.heads == kv_heads * arch.queries_per_group
        for name, shape in expected_shapes(small).items():
            assert tuple(model.get_parameter(name).shape) == shape
        assert config["head_dim"] == arch.head_dim


@pytest.mark.parametrize("kind", DENSE)
def test_the_config_class_alone_accepts_what_the_model_does(kind: str) -> None:
    """For declared families the question whether a shape can be loaded is answered without building it."""
    config = config_of(kind)
    arch = architecture_of(config)

    def answer(kv_heads: int, queries: int, *, prove: bool) -> dict[str, Any] | str:
        try:
            return resized_config(
                config, arch, heads=kv_heads * queries, kv_heads=kv_heads, channels=40, prove=prove
            )
        except CompressError as error:
            return error.cause

    pairs = [(kv, q) for kv in range(1, arch.kv_heads + 1) for q in range(1, arch.queries_per_group + 1)]
    proved = {pair: answer(*pair, prove=True) for pair in pairs}
    assert {pair: answer(*pair, prove=False) for pair in pairs} == proved
    assert any(isinstance(found, dict) for found in proved.values())


def test_resizing_to_the_same_size_changes_no_other_entry() -> None:
    config = config_of("gemma2")
    del config["_name_or_path"]
    assert config | {"head_dim": 16} == resized("gemma2", 2, 96)[0]


def test_refused_llama_head_count_becomes_an_equal_mistral() -> None:
    config, arch = resized("llama_mha", 3, 96)
    assert config["model_type"] == "mistral"
    assert config["architectures"] == ["MistralForCausalLM"]
    assert config["sliding_window"] is None
    assert "mlp_bias" not in config
    # the same weights as Llama and as Mistral, in a shape that both accept, give the same logits
    llama = tiny_model("llama_mha")
    full = {**config, "num_attention_heads": 4, "num_key_value_heads": 4}
    with torch.random.fork_rng():
        mistral = AutoModelForCausalLM.from_config(AutoConfig.for_model(**full), dtype=torch.float32).eval()
    mistral.load_state_dict(llama.state_dict())
    ids = torch.randint(0, arch.vocab, (2, 64), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(mistral(ids).logits, llama(ids).logits, rtol=1e-6, atol=1e-6)


def test_refused_head_counts_are_explained() -> None:
    biased = config_of("llama_mha") | {"attention_bias": True}
    arch = architecture_of(biased)
    assert accepted_kv_heads(biased, arch) == (1, 2, 4)
    with pytest.raises(CompressError, match=r"multiple of the number.*1, 2, 4"):
        resized_config(biased, arch, heads=3, kv_heads=3, channels=96)
    gemma = config_of("gemma2") | {"num_attention_heads": 4, "num_key_value_heads": 4}
    arch = architecture_of(gemma)
    with pytest.raises(CompressError, match=r"multiple of the number.*1, 2, 4"):
        resized_config(gemma, arch, heads=3, kv_heads=3, channels=96)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "channels"), [(8, 4, 0), (0, 0, 96), (16, 8, 96), (8, 4, 97), (7, 3, 96)]
)
def test_impossible_sizes_are_refused(heads: int, kv_heads: int, channels: int) -> None:
    config = config_of("llama_gqa")
    with pytest.raises(CompressError):
        resized_config(config, architecture_of(config), heads=heads, kv_heads=kv_heads, channels=channels)


def test_moe_is_refused_in_one_sentence() -> None:
    with pytest.raises(CompressError, match="mixture of 4 experts") as caught:
        architecture_of(config_of("mixtral"))
    assert caught.value.cause.count(".") == 1


def test_unusable_configs_are_refused() -> None:
    config = config_of("llama_gqa")
    for changes, reason in (
        ({"model_type": "no_such_model"}, "knows no model type"),
        ({"model_type": None}, "names no model_type"),
        ({"hidden_size": "wide"}, "not valid"),
        ({"num_key_value_heads": 3}, "query heads for 3"),
        ({"quantization_config": {"quant_method": "gptq"}}, "already quantized .*'gptq'"),
        ({"quantization_config": {}}, "already quantized"),
        ({"model_type": "t5"}, "decoder"),
    ):
        with pytest.raises(CompressError, match=reason):
            architecture_of({**config, **changes})
    assert architecture_of({**config, "quantization_config": {"quant_method": "lq"}}).hidden == 64


def test_missing_and_surplus_tensors_are_named() -> None:
    config = config_of("llama_gqa")
    names = set(dict(tiny_model("llama_gqa").named_parameters()))
    with pytest.raises(CompressError, match=r"first 'model\.layers\.1\.mlp\.up_proj\.weight'"):
        architecture_of(config, names - {"model.layers.1.mlp.up_proj.weight"})
    with pytest.raises(CompressError, match="declares no such tensor"):
        architecture_of(config, names | {"model.layers.0.mlp.up_proj.bias"})
    with pytest.raises(CompressError, match="lm_head"):
        architecture_of(config, names - {"lm_head.weight"})
    deeper = {name for name in names if not name.startswith("model.layers.1.")}
    with pytest.raises(CompressError, match=r"lacks 7 tensors of a llama model"):
        architecture_of(config, deeper)


def test_decoder_weights_that_two_modules_share_are_refused() -> None:
    """They are stored once: safetensors writes no tensor twice."""
    model = tiny_model("llama_gqa")
    layers = model.model.layers
    layers[1].mlp.down_proj.weight = layers[0].mlp.down_proj.weight
    stored = {name for name, _ in model.named_parameters()}
    with pytest.raises(
        CompressError, match=r"'model\.layers\.1\.mlp\.down_proj\.weight': two modules share one tensor"
    ):
        architecture_of(config_of("llama_gqa"), stored)
