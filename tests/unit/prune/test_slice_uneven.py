"""Masked model = sliced model for layers of any sizes: fewer query heads, other counts, branches that are gone."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from compress.errors import CompressError
from compress.model.architecture import Architecture, LayerShape
from compress.model.checkpoint import Checkpoint, checkpoint_architecture
from compress.model.load import load_model
from compress.prune.mask import GroupMasks
from compress.prune.slice import slice_checkpoint
from compress.structure import StructureMap, full_shape
from tests.tiny import DENSE, TINY, tiny_checkpoint, tiny_model
from tests.unit.prune.common import backward, model_architecture, with_lora
from tests.unit.uneven import IDS, lopsided, make_uneven, relative, structure_of


def opened(kind: str, path: Path) -> tuple[Checkpoint, Architecture]:
    checkpoint = Checkpoint(tiny_checkpoint(kind, path / "full"))
    return checkpoint, checkpoint_architecture(checkpoint)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS, use_cache=False).logits
    return found


@st.composite
def shapes(draw: st.DrawFn, arch: Architecture) -> list[LayerShape]:
    def shape(least: int) -> LayerShape:
        heads = arch.prunable_heads
        return LayerShape(
            kv_heads=draw(st.integers(least, arch.kv_heads)) if heads else arch.kv_heads,
            queries=draw(st.integers(1, arch.queries_per_group)) if heads else arch.queries_per_group,
            channels=draw(st.integers(least, arch.channels)),
        )

    if draw(st.booleans()):
        return [shape(1)] * arch.layers
    return [shape(0) for _ in range(arch.layers)]


@pytest.mark.parametrize("kind", [*DENSE, "gpt2"])
def test_masked_model_equals_sliced_model(kind: str, tmp_path: Path) -> None:
    full, arch = opened(kind, tmp_path)
    model = tiny_model(kind)

    @given(shapes(arch), st.integers(0, 1000))
    @settings(max_examples=8)
    def check(kept: list[LayerShape], seed: int) -> None:
        structure = structure_of(arch, kept, seed)
        with GroupMasks(model, arch, structure.layers):
            masked = logits(model)
        with TemporaryDirectory() as folder:
            slice_checkpoint(full, arch, structure, Path(folder))
            uniform = structure.uniform is not None
            small: Any = (
                AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
                if uniform
                else load_model(folder, dtype=torch.float32)
            )
            assert relative(logits(small), masked) <= 1e-4
            assert StructureMap.load(Path(folder) / "structure.safetensors").shapes == structure.shapes
            small_arch = checkpoint_architecture(Checkpoint(folder))
            assert small_arch.decoder_linear_parameters() == sum(
                parameter.numel()
                for name, parameter in small.named_parameters()
                if name.endswith(tuple(f"{spec.name}.weight" for spec in arch.linears))
            )

    check()


def test_biases_of_a_branch_that_is_gone_go_with_it(tmp_path: Path) -> None:
    config = TINY["llama_gqa"]()
    config.attention_bias = config.mlp_bias = True
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval()
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path / "full")
    full = Checkpoint(tmp_path / "full")
    arch = checkpoint_architecture(full)
    structure = structure_of(arch, lopsided(arch))
    with GroupMasks(model, arch, structure.layers) as masks:
        masked = logits(model)
        masks.update(structure_of(arch, [full_shape(arch)] * arch.layers).layers)
        unmasked = logits(model)
    slice_checkpoint(full, arch, structure, tmp_path / "small")
    assert relative(logits(load_model(tmp_path / "small")), masked) <= 1e-4
    assert torch.equal(unmasked, logits(model))
    names = Checkpoint(tmp_path / "small").names
    assert not [name for name in names if name.startswith(("model.layers.0.self_attn", "model.layers.1.mlp"))]
    assert "model.layers.0.mlp.down_proj.bias" in names


def test_adapters_of_a_branch_that_is_gone_have_gradients_of_zero() -> None:
    model = tiny_model("llama_gqa")
    arch = model_architecture(model)
    peft_model = with_lora(model, arch)
    with GroupMasks(peft_model, arch, structure_of(arch, lopsided(arch)).layers):
        backward(peft_model, seed=0)
    for name, parameter in peft_model.named_parameters():
        if "lora_" in name:
            assert parameter.grad is not None
            gone = "layers.0.self_attn" in name or "layers.1.mlp" in name
            assert bool(parameter.grad.any()) != gone


def test_the_q_and_k_norms_of_an_attention_go_with_it(tmp_path: Path) -> None:
    small = make_uneven("qwen3", tmp_path).small
    assert "model.layers.1.self_attn.q_norm.weight" in small.names
    assert "model.layers.0.self_attn.q_norm.weight" not in small.names
    assert "model.layers.0.input_layernorm.weight" in small.names


def test_fewer_query_heads_in_every_group_are_a_plain_checkpoint(tmp_path: Path) -> None:
    full, arch = opened("llama_gqa", tmp_path)
    structure = structure_of(arch, [LayerShape(kv_heads=4, queries=1, channels=96)] * arch.layers)
    slice_checkpoint(full, arch, structure, tmp_path / "small")
    config = json.loads((tmp_path / "small" / "config.json").read_text())
    assert (config["model_type"], config["num_attention_heads"], config["num_key_value_heads"]) == (
        "llama",
        4,
        4,
    )
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert not [key for key in config if key.startswith("compress")]


def test_an_uneven_model_is_not_pruned_again(tmp_path: Path) -> None:
    made = make_uneven("llama_gqa", tmp_path)
    structure = structure_of(made.arch, lopsided(made.arch))
    with pytest.raises(CompressError, match=r"differ in size already.* Prune the original model again"):
        slice_checkpoint(made.small, made.small_arch, structure, tmp_path / "again")
    assert not (tmp_path / "again").exists()
