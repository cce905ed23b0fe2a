"""Masked model = sliced model, for every family, with and without a folded adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from compress.errors import CompressError
from compress.model.architecture import Architecture, architecture_of
from compress.model.checkpoint import Checkpoint
from compress.prune.mask import GroupMasks
from compress.prune.slice import slice_checkpoint, slice_weight
from compress.structure import LayerStructure, StructureMap, full_layer, kept_rows, structure_map
from tests.tiny import DENSE, tiny_checkpoint, tiny_model
from tests.unit.prune.common import architecture, delta_of, random_layers, with_lora

IDS = torch.randint(4, 128, (2, 24), generator=torch.Generator().manual_seed(11))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS).logits
    return found


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def smaller(arch: Architecture) -> tuple[int, int]:
    kv_heads = max(1, arch.kv_heads // 2) if arch.prunable_heads else arch.kv_heads
    return kv_heads, arch.channels * 2 // 3


def reload(path: Path, like: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation=like.config._attn_implementation
    ).eval()


@pytest.mark.parametrize("kind", [*DENSE, "gpt2"])
def test_masked_model_equals_sliced_model_with_the_adapter_folded(kind: str, tmp_path: Path) -> None:
    source = Checkpoint(tiny_checkpoint(kind, tmp_path / "full"))
    arch = architecture_of(source.config, source.names)
    model = tiny_model(kind)
    plain = logits(model)
    layers = random_layers(arch, *smaller(arch))
    structure = structure_map(arch, layers, base_fingerprint=source.fingerprint())
    peft_model = with_lora(model, arch)
    deltas = {
        arch.module_name(index, spec): delta_of(peft_model, arch, index, spec)
        for index in range(arch.layers)
        for spec in arch.linears
    }
    done: list[tuple[int, int]] = []
    with GroupMasks(peft_model, arch, layers):
        masked = logits(peft_model)
    target = tmp_path / "small"
    slice_checkpoint(
        source, arch, structure, target, deltas=deltas.get, progress=lambda a, b, _: done.append((a, b))
    )
    small = reload(target, model)
    assert relative(logits(small), masked) <= 1e-4
    assert relative(masked, plain) > 1e-2
    assert relative(logits(peft_model), masked) > 1e-2  # the masks are off again
    assert done == [(n, len(source.names)) for n in range(1, len(source.names) + 1)]
    assert StructureMap.load(target / "structure.safetensors") == structure
    result = Checkpoint(target)
    assert result.names == source.names
    small_arch = architecture_of(result.config, result.names)
    assert (small_arch.kv_heads, small_arch.channels) == smaller(arch)
    assert small_arch.head_dim == arch.head_dim
    assert (target / "tokenizer.json").is_file()


@pytest.mark.parametrize("kind", ["llama_gqa", "qwen2", "phi3"])
def test_plain_masks_equal_weights_set_to_zero(kind: str, tmp_path: Path) -> None:
    model = tiny_model(kind)
    arch = architecture_of(model.config.to_dict(), list(model.state_dict()))
    layers = random_layers(arch, *smaller(arch), seed=4)
    with GroupMasks(model, arch, layers):
        masked = logits(model)
    with torch.no_grad():
        for index, layer in enumerate(layers):
            for spec in arch.linears:
                module = model.get_submodule(arch.module_name(index, spec))
                rows = kept_rows(arch, spec, layer)
                if rows is not None:  # pruned rows are gone; o and down then read zeros
                    gone = torch.ones(len(module.weight), dtype=torch.bool)
                    gone[rows] = False
                    module.weight[gone] = 0
                    if module.bias is not None:
                        module.bias[gone] = 0
    assert relative(logits(model), masked) <= 1e-5


def test_the_adapter_sees_the_masked_input_too() -> None:
    model = tiny_model("llama_gqa")
    arch = architecture_of(model.config.to_dict())
    peft_model = with_lora(model, arch)
    layers = random_layers(arch, 2, 20)
    seen: dict[str, torch.Tensor] = {}
    down = model.model.layers[0].mlp.down_proj
    down.lora_A["default"].register_forward_pre_hook(lambda _, x: seen.update(lora=x[0]))
    down.base_layer.register_forward_pre_hook(lambda _, x: seen.update(base=x[0]))
    with GroupMasks(peft_model, arch, layers):
        logits(peft_model)
    gone = torch.ones(arch.channels, dtype=torch.bool)
    gone[layers[0].channels.long()] = False
    assert torch.equal(seen["lora"], seen["base"])
    assert bool((seen["lora"][..., gone] == 0).all())
    assert bool((seen["lora"][..., ~gone] != 0).any())


def test_masks_of_everything_change_nothing_and_follow_updates() -> None:
    model = tiny_model("llama_gqa")
    arch = architecture_of(model.config.to_dict())
    plain = logits(model)
    masks = GroupMasks(model, arch)
    assert torch.equal(logits(model), plain)
    masks.update(random_layers(arch, 2, 20))
    assert relative(logits(model), plain) > 1e-2
    masks.update([full_layer(arch)] * arch.layers)
    assert torch.equal(logits(model), plain)
    masks.update(random_layers(arch, 2, 20))
    masks.remove()
    assert torch.equal(logits(model), plain)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stored_dtype_is_kept_and_the_sum_is_rounded_once(dtype: torch.dtype, tmp_path: Path) -> None:
    source = Checkpoint(tiny_checkpoint("llama_gqa", tmp_path / "full", dtype=dtype))
    arch = architecture_of(source.config, source.names)
    generator = torch.Generator().manual_seed(0)
    deltas = {
        arch.module_name(i, spec): torch.randn(arch.linear_shape(spec), generator=generator) * 0.01
        for i in range(arch.layers)
        for spec in arch.linears
    }
    structure = structure_map(arch, random_layers(arch, 3, 40), base_fingerprint="")
    slice_checkpoint(source, arch, structure, tmp_path / "small", deltas=deltas.get)
    small = Checkpoint(tmp_path / "small")
    assert {small.dtype(name) for name in small.names} == {dtype}
    name = arch.tensor_name(1, arch.linears[0])
    folded = source.read(name).float() + deltas[arch.module_name(1, arch.linears[0])]
    rows = kept_rows(arch, arch.linears[0], structure.layers[1])
    assert rows is not None
    assert torch.equal(small.read(name), folded[rows].to(dtype))


def test_identity_copies_every_tensor(tmp_path: Path) -> None:
    source = Checkpoint(tiny_checkpoint("llama_tied", tmp_path / "full"))
    arch = architecture_of(source.config, source.names)
    structure = structure_map(arch, [full_layer(arch)] * arch.layers, base_fingerprint="")
    slice_checkpoint(source, arch, structure, tmp_path / "same")
    same = Checkpoint(tmp_path / "same")
    assert all(torch.equal(same.read(name), source.read(name)) for name in source.names)
    assert same.fingerprint() == source.fingerprint()


def test_transposed_weights_keep_their_orientation() -> None:
    arch = architecture()
    generator = torch.Generator().manual_seed(0)
    layer = random_layers(arch, 2, 10)[0]
    for spec in arch.linears:
        weight = torch.randn(arch.linear_shape(spec), generator=generator)
        delta = torch.randn(arch.linear_shape(spec), generator=generator)
        turned = type(spec)(name=spec.name, role=spec.role, transposed=True)
        expected = slice_weight(weight + delta, arch, spec, layer)
        found = slice_weight(weight.t().contiguous(), arch, turned, layer, delta_OI=delta)
        assert torch.equal(found, expected.t())
        assert found.is_contiguous()


def test_structures_that_do_not_fit_write_nothing(tmp_path: Path) -> None:
    source = Checkpoint(tiny_checkpoint("llama_gqa", tmp_path / "full"))
    arch = architecture_of(source.config, source.names)
    other = architecture(layers=3)
    structure = structure_map(other, random_layers(other, 2, 8), base_fingerprint="")
    with pytest.raises(CompressError, match="was made for"):
        slice_checkpoint(source, arch, structure, tmp_path / "small")
    assert not (tmp_path / "small").exists()
    config = tmp_path / "full" / "config.json"
    config.write_text(json.dumps(source.config | {"quantization_config": {"quant_method": "lq"}}))
    structure = structure_map(arch, random_layers(arch, 2, 20), base_fingerprint="")
    with pytest.raises(CompressError, match="already quantized"):
        slice_checkpoint(Checkpoint(tmp_path / "full"), arch, structure, tmp_path / "small")


def test_a_failure_leaves_no_model_behind(tmp_path: Path) -> None:
    source = Checkpoint(tiny_checkpoint("llama_gqa", tmp_path / "full"))
    arch = architecture_of(source.config, source.names)
    structure = structure_map(arch, random_layers(arch, 2, 20), base_fingerprint="")

    def stop(done: int, total: int, name: str) -> None:
        if done == total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        slice_checkpoint(source, arch, structure, tmp_path / "small", progress=stop)
    assert list((tmp_path / "small").iterdir()) == []


def test_config_of_the_small_model(tmp_path: Path) -> None:
    source = Checkpoint(tiny_checkpoint("llama_gqa", tmp_path / "full"))
    arch = architecture_of(source.config, source.names)
    layers = [
        LayerStructure(
            kv_groups=torch.tensor([1, 3], dtype=torch.int32), channels=torch.arange(32, dtype=torch.int32)
        )
    ] * arch.layers
    slice_checkpoint(source, arch, structure_map(arch, layers, base_fingerprint=""), tmp_path / "small")
    config = json.loads((tmp_path / "small" / "config.json").read_text())
    assert config["num_key_value_heads"] == 2
    assert config["num_attention_heads"] == 4
    assert config["intermediate_size"] == 32
    assert config["head_dim"] == 8
    assert config["hidden_size"] == arch.hidden
