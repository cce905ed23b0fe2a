"""Biases added to o and down: in place, created where the family's config has an entry for them, else refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from compress.errors import CompressError
from compress.model.architecture import Architecture, LayerShape
from compress.model.checkpoint import Checkpoint, checkpoint_architecture
from compress.model.load import load_model
from compress.prune.mask import GroupMasks
from compress.prune.slice import slice_checkpoint
from compress.structure import StructureMap, kept_columns
from tests.tiny import tiny_checkpoint
from tests.unit.uneven import IDS, lopsided, relative, structure_of


def opened(kind: str, folder: Path, dtype: torch.dtype = torch.float32) -> tuple[Checkpoint, Architecture]:
    full = Checkpoint(tiny_checkpoint(kind, folder / "full", dtype=dtype))
    return full, checkpoint_architecture(full)


def uniform(arch: Architecture) -> StructureMap:
    queries, kv_heads = arch.queries_per_group, arch.kv_heads
    if arch.prunable_heads:
        queries, kv_heads = max(1, queries // 2), max(1, kv_heads // 2)
    return structure_of(arch, [LayerShape(kv_heads=kv_heads, queries=queries, channels=40)] * arch.layers)


def random_biases(arch: Architecture, roles: tuple[str, ...]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {
        arch.module_name(layer, spec): torch.randn(arch.hidden, generator=generator)
        for layer in range(arch.layers)
        for spec in arch.linears
        if spec.role in roles
    }


def reference(full: Path, arch: Architecture, structure: StructureMap, biases: dict[str, Tensor]) -> Tensor:
    """Logits of the masked full model with the biases added by hooks."""
    model = load_model(full, dtype=torch.float32)
    for name, bias in biases.items():
        index, spec = next(
            (i, s) for i in range(arch.layers) for s in arch.linears if arch.module_name(i, s) == name
        )
        columns = kept_columns(arch, spec, structure.layers[index])
        if columns is None or len(columns):
            model.get_submodule(name).register_forward_hook(lambda _, __, out, bias=bias: out + bias)
    with torch.no_grad(), GroupMasks(model, arch, structure.layers):
        found: Tensor = model(input_ids=IDS).logits
    return found


def stock(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


@pytest.mark.parametrize(
    ("kind", "roles", "switched"),
    [
        ("llama_gqa", ("o", "down"), {"attention_bias", "mlp_bias"}),
        ("llama_gqa", ("o",), {"attention_bias"}),
        ("llama_tied", ("down",), {"mlp_bias"}),
        ("qwen3", ("o",), {"attention_bias"}),
        ("gemma2", ("o",), {"attention_bias"}),
        ("gemma3_text", ("o",), {"attention_bias"}),
        ("gpt2", ("down",), set()),
    ],
)
def test_stock_transformers_gives_the_logits_of_the_reference(
    kind: str, roles: tuple[str, ...], switched: set[str], tmp_path: Path
) -> None:
    full, arch = opened(kind, tmp_path)
    structure, biases = uniform(arch), random_biases(arch, roles)
    slice_checkpoint(full, arch, structure, tmp_path / "small", biases=biases)
    with torch.no_grad():
        found = stock(tmp_path / "small")(input_ids=IDS).logits
    expected = reference(full.path, arch, structure, biases)
    assert relative(found, expected) <= 1e-4
    assert relative(expected, reference(full.path, arch, structure, {})) > 1e-2
    small = Checkpoint(tmp_path / "small")
    assert {key for key in ("attention_bias", "mlp_bias") if small.config.get(key)} == switched
    checkpoint_architecture(small)
    added = set(small.names) - set(full.names)
    zeros = {name for name in added if name.removesuffix(".bias") not in biases}
    assert all(not small.read(name).any() for name in zeros)
    assert bool(switched) == bool(added)


def test_an_uneven_model_gets_them_too_but_not_where_a_branch_is_gone(tmp_path: Path) -> None:
    full, arch = opened("llama_gqa", tmp_path)
    structure, biases = structure_of(arch, lopsided(arch)), random_biases(arch, ("o", "down"))
    slice_checkpoint(full, arch, structure, tmp_path / "small", biases=biases)
    with torch.no_grad():
        found = load_model(tmp_path / "small")(input_ids=IDS).logits
    assert relative(found, reference(full.path, arch, structure, biases)) <= 1e-4
    assert "model.layers.0.self_attn.o_proj.bias" not in Checkpoint(tmp_path / "small").names


def test_a_bias_of_a_gone_branch_alone_needs_no_entry(tmp_path: Path) -> None:
    full, arch = opened("mistral", tmp_path)
    bias = {"model.layers.0.self_attn.o_proj": torch.ones(arch.hidden)}
    slice_checkpoint(full, arch, structure_of(arch, lopsided(arch)), tmp_path / "small", biases=bias)
    assert not [name for name in Checkpoint(tmp_path / "small").names if name.endswith(".bias")]


def test_an_existing_bias_is_added_to_and_rounded_once(tmp_path: Path) -> None:
    full, arch = opened("gpt2", tmp_path, torch.bfloat16)
    biases = random_biases(arch, ("down",))
    slice_checkpoint(full, arch, uniform(arch), tmp_path / "small", biases=biases)
    small = Checkpoint(tmp_path / "small")
    for module, bias in biases.items():
        name = f"{module}.bias"
        assert torch.equal(small.read(name), (full.read(name).float() + bias).bfloat16())


def test_a_created_bias_has_the_dtype_of_its_weight(tmp_path: Path) -> None:
    full, arch = opened("llama_gqa", tmp_path, torch.float16)
    slice_checkpoint(full, arch, uniform(arch), tmp_path / "small", biases=random_biases(arch, ("o",)))
    small = Checkpoint(tmp_path / "small")
    assert {small.dtype(name) for name in small.names} == {torch.float16}


@pytest.mark.parametrize(
    ("kind", "roles", "match"),
    [
        (
            "mistral",
            ("o",),
            r"a mistral model none at self_attn.o_proj\. Use --repair refit or --repair none",
        ),
        ("qwen2", ("o", "down"), "a qwen2 model none at self_attn.o_proj and mlp.down_proj"),
        ("phi3", ("down",), "a phi3 model none at mlp.down_proj"),
        ("gemma2", ("o", "down"), "a gemma2 model none at mlp.down_proj"),
    ],
)
def test_a_family_without_such_a_bias_is_refused_before_anything_is_written(
    kind: str, roles: tuple[str, ...], match: str, tmp_path: Path
) -> None:
    full, arch = opened(kind, tmp_path)
    with pytest.raises(CompressError, match=match):
        slice_checkpoint(full, arch, uniform(arch), tmp_path / "small", biases=random_biases(arch, roles))
    assert not (tmp_path / "small").exists()


def test_a_head_count_that_only_mistral_takes_is_refused_with_biases(tmp_path: Path) -> None:
    full, arch = opened("llama_gqa", tmp_path)
    structure = structure_of(arch, [LayerShape(kv_heads=3, queries=2, channels=40)] * arch.layers)
    slice_checkpoint(full, arch, structure, tmp_path / "plain")
    with pytest.raises(CompressError, match="Keep one of these numbers of key/value heads instead: 1, 2, 4"):
        slice_checkpoint(full, arch, structure, tmp_path / "small", biases=random_biases(arch, ("o",)))
    assert not (tmp_path / "small").exists()


def test_wrong_names_and_shapes_are_programming_errors(tmp_path: Path) -> None:
    full, arch = opened("llama_gqa", tmp_path)
    for bias in (
        {"model.layers.0.self_attn.q_proj": torch.ones(arch.hidden)},
        {"model.layers.0.self_attn.o_proj": torch.ones(arch.hidden - 1)},
    ):
        with pytest.raises(ValueError, match="can be added"):
            slice_checkpoint(full, arch, uniform(arch), tmp_path / "small", biases=bias)
