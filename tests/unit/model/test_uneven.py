"""Models whose layers differ in size: how they are written, refused and opened."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from compress.errors import CompressError
from compress.evaluate.latency import throughput
from compress.model.architecture import Architecture, LayerShape, architecture_of
from compress.model.checkpoint import Checkpoint, checkpoint_architecture
from compress.model.config import build_config
from compress.model.load import load_model, load_tokenizer
from compress.model.uneven import is_uneven, plain_config
from compress.model.uneven_config import can_be_uneven, refuse_uneven, uneven_config
from tests.tiny import DENSE, TINY
from tests.unit.uneven import IDS, Uneven, lopsided, make_uneven, relative


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Uneven:
    return make_uneven("llama_tied", tmp_path_factory.mktemp("uneven"))


def opened(made: Uneven) -> Any:
    return load_model(made.small.path, dtype=torch.float32)


def logits(model: Any, **options: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS, **options).logits
    return found


def test_the_config_keeps_the_base_sizes_and_lists_the_layers(made: Uneven) -> None:
    config = json.loads((made.small.path / "config.json").read_text())
    assert config["model_type"] == "compress_llama"
    assert config["architectures"] == ["CompressLlamaForCausalLM"]
    assert config["compress_format"] == 1
    assert config["compress_layers"] == [
        {"kv_heads": 0, "queries": 2, "channels": 32},
        {"kv_heads": 1, "queries": 1, "channels": 40},
        {"kv_heads": 1, "queries": 1, "channels": 0},
    ]
    assert plain_config(config) == {k: v for k, v in made.full.config.items() if k != "_name_or_path"}
    assert is_uneven(config)
    assert not is_uneven(made.full.config)


def test_the_architecture_tells_what_each_layer_has(made: Uneven) -> None:
    arch = made.small_arch
    assert arch.layer_shapes == made.structure.shapes
    assert (arch.family, arch.heads, arch.kv_heads, arch.channels) == ("llama", 4, 2, 96)
    here = arch.at(1)
    assert (here.heads, here.kv_heads, here.queries_per_group, here.channels) == (1, 1, 1, 40)
    assert here.layer_shapes is None
    assert [[spec.role for spec in arch.linears_at(layer)] for layer in range(3)] == [
        ["gate", "up", "down"],
        ["q", "k", "v", "o", "gate", "up", "down"],
        ["q", "k", "v", "o"],
    ]
    assert arch.gone() == ("model.layers.0.self_attn", "model.layers.2.mlp")
    assert made.arch.at(1) is made.arch
    assert made.arch.linears_at(0) == made.arch.linears


def test_stock_loaders_refuse_it_by_name(made: Uneven) -> None:
    for loader in (AutoModelForCausalLM, AutoConfig):
        with pytest.raises(ValueError, match="model type `compress_llama`"):
            loader.from_pretrained(made.small.path)


@pytest.mark.parametrize(
    "kind", ["llama_mha", "llama_gqa", "llama_mqa", "llama_tied", "gemma2", "gemma3_text", "phi3"]
)
def test_generation_with_the_cache_equals_generation_without(kind: str, tmp_path: Path) -> None:
    model: Any = load_model(make_uneven(kind, tmp_path).small.path)
    prompt = IDS[:1, :9]
    options = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None, "pad_token_id": 3}
    with_cache = model.generate(prompt, use_cache=True, **options)
    assert with_cache.shape == (1, 33)  # past the sliding window of 16
    assert torch.equal(with_cache, model.generate(prompt, use_cache=False, **options))


@pytest.mark.parametrize("kind", ["llama_gqa", "qwen3", "phi3"])
def test_attention_implementations_agree_and_can_be_changed(kind: str, tmp_path: Path) -> None:
    model: Any = load_model(make_uneven(kind, tmp_path).small.path)
    assert model.config._attn_implementation == "sdpa"
    mask = torch.ones_like(IDS)
    mask[0, :5] = 0
    fused = logits(model, attention_mask=mask)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin, attention_mask=mask), fused)
    model.set_attn_implementation("eager")
    assert twin.model.layers[1].self_attn.config._attn_implementation == "sdpa"
    assert relative(logits(model, attention_mask=mask)[0, 5:], fused[0, 5:]) <= 1e-5
    assert model.model.layers[1].self_attn.config._attn_implementation == "eager"


def test_padding_on_the_left_does_not_matter_where_the_first_attention_is_gone(made: Uneven) -> None:
    model = opened(made)
    padded = torch.cat([torch.full((1, 4), 3), IDS[:1, :8]], dim=1)
    mask = (torch.arange(12) >= 4).long()[None]
    options: dict[str, Any] = {
        "max_new_tokens": 10,
        "do_sample": False,
        "eos_token_id": None,
        "pad_token_id": 3,
    }
    alone = model.generate(IDS[:1, :8], attention_mask=torch.ones(1, 8, dtype=torch.long), **options)
    assert torch.equal(model.generate(padded, attention_mask=mask, **options)[0, 12:], alone[0, 8:])


def test_dtype_and_tied_weights_are_those_of_other_models(made: Uneven) -> None:
    model: Any = load_model(made.small.path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.lm_head.weight is model.model.embed_tokens.weight
    names = {name for name, _ in model.named_parameters()}
    assert names == set(made.small.names)
    assert not model.training


def test_what_was_loaded_can_be_saved_and_loaded(made: Uneven, tmp_path: Path) -> None:
    model = opened(made)
    model.save_pretrained(tmp_path / "again")
    again = Checkpoint(tmp_path / "again")
    assert again.fingerprint() == made.small.fingerprint()
    assert checkpoint_architecture(again).layer_shapes == made.structure.shapes
    assert torch.equal(logits(load_model(tmp_path / "again")), logits(model))


def test_gradients_pass_a_branch_that_is_gone(made: Uneven) -> None:
    model = opened(made).train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(
        bool(parameter.grad.abs().sum() > 0) for name, parameter in model.named_parameters() if "proj" in name
    )


def test_the_tokenizer_is_the_one_the_family_has(made: Uneven) -> None:
    ours, stock = load_tokenizer(made.small.path), AutoTokenizer.from_pretrained(made.full.path)
    assert type(ours) is type(stock)
    assert ours("a text")["input_ids"] == stock("a text")["input_ids"]


def test_its_speed_can_be_measured(made: Uneven) -> None:
    result = throughput(opened(made), IDS[:, :8], decode_tokens=3, repeats=1)
    assert result.decode_tokens_per_second > 0


@pytest.mark.parametrize("kind", [*DENSE, "gpt2"])
def test_every_kind_can_be_uneven(kind: str) -> None:
    config = TINY[kind]().to_dict()
    arch = architecture_of(config)
    assert can_be_uneven(config, arch) == ""
    assert uneven_config(config, arch, lopsided(arch))["model_type"] == f"compress_{config['model_type']}"


def test_a_class_that_relies_on_one_size_is_named() -> None:
    config = TINY["llama_gqa"]().to_dict() | {
        "model_type": "olmo2"
    }  # its norms are as wide as all heads together
    config.pop("head_dim")
    linears = architecture_of(TINY["llama_gqa"]().to_dict()).linears
    arch = Architecture(
        family="olmo2", hidden=64, layers=2, heads=8, kv_heads=4, head_dim=8, channels=96, vocab=128,
        tied=False, linears=linears,
    )  # fmt: skip
    assert "does not run with them" in can_be_uneven(config, arch)
    with pytest.raises(CompressError, match="The layers of a olmo2 model cannot differ in size"):
        uneven_config(config, arch, lopsided(arch))


def test_an_mlp_that_is_no_module_of_its_own_cannot_go() -> None:
    config = AutoConfig.for_model(
        "opt", vocab_size=64, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, word_embed_proj_dim=32,
    ).to_dict()  # fmt: skip
    arch = architecture_of(config)
    assert "no module of its own" in can_be_uneven(config, arch)
    full = LayerShape(kv_heads=4, queries=1, channels=48)
    with pytest.raises(CompressError, match="no module of its own"):
        uneven_config(config, arch, [full, LayerShape(kv_heads=4, queries=1, channels=0)])


def test_shapes_that_do_not_fit_are_refused() -> None:
    config = TINY["llama_gqa"]().to_dict()
    arch = architecture_of(config)
    full = LayerShape(kv_heads=4, queries=2, channels=96)
    for shape, match in (
        (LayerShape(kv_heads=5, queries=2, channels=96), "Layer 1 keeps 5 of 4 KV groups"),
        (LayerShape(kv_heads=4, queries=3, channels=96), "keeps 3 of 2 query heads"),
        (LayerShape(kv_heads=4, queries=0, channels=96), "keeps 0 of 2 query heads"),
        (LayerShape(kv_heads=4, queries=2, channels=97), "97 of 96 channels"),
    ):
        with pytest.raises(CompressError, match=match):
            uneven_config(config, arch, [full, shape])
    with pytest.raises(CompressError, match="1 shapes for 2 layers"):
        uneven_config(config, arch, [full])
    gpt2 = TINY["gpt2"]().to_dict()
    heads = LayerShape(kv_heads=2, queries=1, channels=64)
    with pytest.raises(CompressError, match="heads cannot be pruned: no rule says"):
        uneven_config(gpt2, architecture_of(gpt2), [heads, heads])


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"compress_format": 2}, "compress_format 2, not 1"),
        ({"compress_format": None}, "compress_format None"),
        ({"compress_layers": None}, "no compress_layers for 3 layers"),
        ({"compress_layers": [{}]}, "1 compress_layers for 3 layers"),
        ({"compress_layers": [{}] * 3}, "Entry 0 of compress_layers lacks a whole number"),
        ({"compress_layers": [{"kv_heads": 1, "queries": 1, "channels": 1.5}] * 3}, "lacks a whole number"),
        ({"compress_layers": [{"kv_heads": True, "queries": 1, "channels": 1}] * 3}, "lacks a whole number"),
        ({"compress_layers": [{"kv_heads": 3, "queries": 1, "channels": 1}] * 3}, "keeps 3 of 2 KV groups"),
        ({"compress_layers": [{"kv_heads": 1, "queries": 1, "channels": -1}] * 3}, "-1 of 96 channels"),
        ({"compress_layers": [{"kv_heads": 1, "queries": 3, "channels": 1}] * 3}, "keeps 3 of 2 query heads"),
        ({"model_type": "compress_nothing"}, "knows no model type 'nothing'"),
    ],
)
def test_configs_that_contradict_themselves_are_refused(
    changes: dict[str, Any], match: str, made: Uneven
) -> None:
    with pytest.raises(CompressError, match=match):
        architecture_of({**made.small.config, **changes})


def test_weights_that_contradict_the_list_are_refused(made: Uneven, tmp_path: Path) -> None:
    layers = [dict(entry) for entry in made.small.config["compress_layers"]]
    layers[1]["channels"] += 1
    changed = {**made.small.config, "compress_layers": layers}
    for name in ("model.safetensors", "config.json"):
        (tmp_path / name).write_bytes((made.small.path / name).read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(changed))
    with pytest.raises(CompressError, match=r"has the shape \(40, 32\) where the config asks for \(41, 32\)"):
        checkpoint_architecture(Checkpoint(tmp_path))
    layers[1]["channels"] = 0
    with pytest.raises(
        CompressError, match=r"holds 'model.layers.1.mlp.gate_proj.weight', but its config declares no"
    ):
        architecture_of(changed, made.small.names)


def test_the_config_object_reads_like_the_family_s(made: Uneven) -> None:
    built = build_config(made.small.config)
    assert isinstance(built, type(build_config(made.full.config)))
    assert built.to_dict()["compress_layers"] == made.small.config["compress_layers"]
    assert built.max_position_embeddings == 256


def test_uneven_models_are_not_pruned_again(made: Uneven) -> None:
    refuse_uneven(made.arch)
    with pytest.raises(CompressError, match="differ in size already"):
        refuse_uneven(made.small_arch)
    assert can_be_uneven(made.small.config, made.small_arch) == "they differ already"
