"""Adapters of a model whose layers differ: attached, saved, merged, and put onto the full model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from compress.adapters.adapter_file import CONFIG_FILE, PREFIX, WEIGHTS_FILE, AdapterFile
from compress.adapters.attach import attach_lora, load_adapter, lora_delta, save_adapter
from compress.adapters.merge import merge_adapter
from compress.adapters.recover import recover_adapter
from compress.errors import CompressError, UsageError
from compress.model.architecture import LayerShape
from compress.model.checkpoint import Checkpoint, checkpoint_architecture
from compress.model.load import load_model
from compress.structure import full_layer, kept_columns, kept_rows, structure_map
from tests.unit.adapters.common import add_initial_factors, randomise, save_random_adapter
from tests.unit.uneven import IDS, Uneven, make_uneven, relative

KINDS = ["llama_gqa", "qwen2", "phi3", "gpt2"]


def trained(made: Uneven, out: Path) -> Path:
    """An adapter as ``train`` writes it, with random factors."""
    model = attach_lora(load_model(made.small.path), made.small_arch, rank=4, alpha=6, dropout=0.0)
    randomise(model)
    return save_adapter(model, out, base_name="small")


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS).logits
    return found


def modules_of(made: Uneven) -> set[str]:
    arch = made.small_arch
    return {arch.module_name(i, spec) for i in range(arch.layers) for spec in arch.linears_at(i)}


@pytest.mark.parametrize("kind", KINDS)
def test_every_linear_that_is_there_is_adapted(kind: str, tmp_path: Path) -> None:
    made = make_uneven(kind, tmp_path)
    model = attach_lora(load_model(made.small.path), made.small_arch, rank=4)
    adapted = {name for name, module in model.get_base_model().named_modules() if hasattr(module, "lora_A")}
    assert adapted == modules_of(made)
    found = logits(model)
    assert torch.equal(found, logits(load_model(made.small.path)))
    randomise(model)
    for name in adapted:
        delta = lora_delta(model, name)
        assert delta is not None
        assert bool(delta.any())


def test_targets_that_no_layer_has_any_more_are_refused(tmp_path: Path) -> None:
    made = make_uneven("llama_gqa", tmp_path)
    gone = LayerShape(kv_heads=0, queries=2, channels=4)
    arch = replace(made.arch, layer_shapes=(gone,) * made.arch.layers)
    with pytest.raises(UsageError, match=r"no adapter target q\. Choose among all, gate, up, down"):
        attach_lora(load_model(made.small.path), arch, targets=["q", "up"])


@pytest.mark.parametrize("kind", KINDS)
def test_saved_loaded_and_merged_it_computes_the_same(kind: str, tmp_path: Path) -> None:
    made = make_uneven(kind, tmp_path)
    adapter = trained(made, tmp_path / "adapter")
    loaded = logits(load_adapter(load_model(made.small.path), adapter))
    assert relative(loaded, logits(load_model(made.small.path))) > 1e-3
    merge_adapter(made.small, adapter, tmp_path / "merged")
    merged = Checkpoint(tmp_path / "merged")
    assert merged.config == made.small.config
    assert checkpoint_architecture(merged).layer_shapes == made.structure.shapes
    assert relative(logits(load_model(merged.path)), loaded) <= 1e-4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("initial", [False, True])
def test_slicing_the_recovered_delta_gives_the_small_one_back(
    kind: str, initial: bool, tmp_path: Path
) -> None:
    made = make_uneven(kind, tmp_path)
    adapter = trained(made, tmp_path / "adapter")
    if initial:
        add_initial_factors(adapter)
    recover_adapter(adapter, made.structure, made.arch, made.full, tmp_path / "out", full_name="org/full")
    with AdapterFile(tmp_path / "out") as file:
        assert set(file.modules) == modules_of(made)
        scaling = {module: file.scaling(module).value for module in file.modules}
    full = {k: v.double() for k, v in load_file(tmp_path / "out" / WEIGHTS_FILE).items()}
    small = {k: v.double() for k, v in load_file(adapter / WEIGHTS_FILE).items()}
    start = (
        {k: v.double() for k, v in load_file(adapter / "initial_factors.safetensors").items()}
        if initial
        else {}
    )

    def product(tensors: dict[str, torch.Tensor], module: str) -> torch.Tensor:
        return tensors[f"{PREFIX}{module}.lora_B.weight"] @ tensors[f"{PREFIX}{module}.lora_A.weight"]

    # as stock peft puts it onto the full model: deltas as differences of merged weights
    peft_model = PeftModel.from_pretrained(load_model(made.full.path), str(tmp_path / "out"))
    merged = peft_model.merge_and_unload()
    for index, layer in enumerate(made.structure.layers):
        for spec in made.arch.linears:
            module = made.arch.module_name(index, spec)
            before, after = (
                made.full.read(f"{module}.weight"),
                merged.get_parameter(f"{module}.weight").detach(),
            )
            if module not in scaling:
                assert torch.equal(before, after)
                continue
            delta = scaling[module] * product(full, module)
            rows, columns = kept_rows(made.arch, spec, layer), kept_columns(made.arch, spec, layer)
            rows = torch.arange(delta.shape[0]) if rows is None else rows
            columns = torch.arange(delta.shape[1]) if columns is None else columns
            expected = 1.5 * (product(small, module) - (product(start, module) if initial else 0))
            torch.testing.assert_close(delta[rows][:, columns], expected, rtol=1e-6, atol=1e-7)
            outside = delta.clone()
            outside[rows[:, None], columns] = 0
            assert not outside.any()
            change = (after - before).double()
            torch.testing.assert_close(change.t() if spec.transposed else change, delta, rtol=1e-4, atol=1e-5)


def test_the_recovered_adapter_leaves_out_what_was_gone(tmp_path: Path) -> None:
    made = make_uneven("llama_gqa", tmp_path)
    adapter = save_random_adapter(
        made.small.path,
        tmp_path / "adapter",
        target_modules=["q_proj", "k_proj", "up_proj"],
        exclude_modules=["k_proj"],
    )
    recover_adapter(adapter, made.structure, made.arch, made.full, tmp_path / "out", full_name="org/full")
    config = json.loads((tmp_path / "out" / CONFIG_FILE).read_text())
    assert config["exclude_modules"] == (
        r"(?:.*\.)?k_proj|model\.layers\.0\.self_attn\..*|model\.layers\.1\.mlp\..*"
    )
    model = PeftModel.from_pretrained(load_model(made.full.path), str(tmp_path / "out"))
    adapted = {name for name, module in model.get_base_model().named_modules() if hasattr(module, "lora_A")}
    assert adapted == {"model.layers.1.self_attn.q_proj", "model.layers.0.mlp.up_proj"}


def test_a_chain_may_start_from_an_uneven_model(tmp_path: Path) -> None:
    made = make_uneven("llama_gqa", tmp_path)
    adapter, arch = trained(made, tmp_path / "adapter"), made.small_arch
    identity = structure_map(arch, [full_layer(arch)] * arch.layers, base_fingerprint="")
    recover_adapter(adapter, identity, arch, made.small, tmp_path / "out", full_name="org/uneven")
    small, full = load_file(adapter / WEIGHTS_FILE), load_file(tmp_path / "out" / WEIGHTS_FILE)
    assert small.keys() == full.keys()
    assert all(torch.equal(small[name], full[name]) for name in small)
    with pytest.raises(CompressError, match="differ in size already"):
        recover_adapter(adapter, made.structure, arch, made.small, tmp_path / "no", full_name="x")
