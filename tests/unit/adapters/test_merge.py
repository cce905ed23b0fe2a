from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from compress.adapters.adapter_file import PREFIX, WEIGHTS_FILE
from compress.adapters.merge import merge_adapter
from compress.errors import CompressError
from compress.model.checkpoint import Checkpoint
from compress.model.load import load_model
from tests.tiny import tiny_checkpoint
from tests.unit.adapters.common import add_initial_factors, save_random_adapter

ALL: dict[str, Any] = {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 9}, "use_rslora": True}


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("llama_gqa", {}),
        ("llama_gqa", ALL),
        ("llama_gqa", {"target_modules": ["embed_tokens", "lm_head", "v_proj"]}),
        ("llama_gqa", {"target_modules": ["v_proj"], "modules_to_save": ["lm_head"]}),
        ("llama_tied", {}),
        ("qwen2", {"target_modules": ["q_proj", "v_proj"], "lora_bias": True}),
        ("qwen2", {"target_modules": ["q_proj", "o_proj"], "bias": "all"}),
        ("gemma2", {}),
        ("phi3", {}),
        ("gpt2", {"fan_in_fan_out": True}),
    ],
)
@pytest.mark.filterwarnings("ignore:.*have invalid shape.*")  # peft mistakes a LoRA bias for a broken factor
def test_merging_equals_peft(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    full = Checkpoint(tiny_checkpoint(kind, tmp_path / "full"))
    adapter = save_random_adapter(full.path, tmp_path / "adapter", **options)
    done: list[int] = []
    merged = merge_adapter(full, adapter, tmp_path / "out", progress=lambda step, *_: done.append(step))
    assert done == list(range(1, len(full.names) + 1))
    reference = PeftModel.from_pretrained(
        load_model(full.path, dtype=torch.float32), str(adapter)
    ).merge_and_unload()
    expected = reference.state_dict()
    tensors = load_file(merged / "model.safetensors")
    assert set(tensors) == set(full.names)
    changed = 0
    for name, tensor in tensors.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-6, msg=name)
        changed += not torch.equal(tensor, full.read(name))
    assert changed > 0
    ids = torch.randint(0, 128, (1, 7), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = load_model(merged, dtype=torch.float32)(input_ids=ids).logits
        torch.testing.assert_close(logits, reference(input_ids=ids).logits, rtol=1e-4, atol=1e-5)


def test_the_dtype_is_kept_and_rounded_once(tmp_path: Path) -> None:
    full = Checkpoint(tiny_checkpoint("llama_gqa", tmp_path / "full", dtype=torch.bfloat16))
    adapter = save_random_adapter(full.path, tmp_path / "adapter", dtype=torch.bfloat16)
    merge_adapter(full, adapter, tmp_path / "out")
    merged, factors = Checkpoint(tmp_path / "out"), load_file(adapter / WEIGHTS_FILE)
    name = "model.layers.1.mlp.up_proj"
    delta = (
        1.5
        * factors[f"{PREFIX}{name}.lora_B.weight"].double()
        @ factors[f"{PREFIX}{name}.lora_A.weight"].double()
    )
    exact = full.read(f"{name}.weight").double() + delta
    ours = merged.read(f"{name}.weight")
    assert ours.dtype == torch.bfloat16
    assert (
        ours == exact.bfloat16()
    ).float().mean() > 0.99  # a float32 sum may land on the other side of a tie
    assert ((ours.double() - exact).abs() <= exact.abs() * 2**-8 + 1e-7).all()
    assert merged.config == full.config
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def refused(tmp_path: Path, kind: str, message: str, **options: Any) -> None:
    full = Checkpoint(tiny_checkpoint(kind, tmp_path / "full"))
    adapter = save_random_adapter(full.path, tmp_path / "adapter", **options)
    with pytest.raises(CompressError, match=message):
        merge_adapter(full, adapter, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*"))


def test_dora_is_refused(tmp_path: Path) -> None:
    refused(tmp_path, "llama_gqa", "is a DoRA", use_dora=True)


@pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings=True.*")
def test_one_side_of_tied_embeddings_is_refused(tmp_path: Path) -> None:
    refused(tmp_path, "llama_tied", "shares its weight", target_modules=["embed_tokens"])


def test_adapters_of_another_model_are_refused(tmp_path: Path) -> None:
    full = Checkpoint(tiny_checkpoint("llama_gqa", tmp_path / "full"))
    wider = tiny_checkpoint("llama_mha", tmp_path / "other")
    adapter = save_random_adapter(wider, tmp_path / "adapter")
    with pytest.raises(CompressError, match="is made for"):
        merge_adapter(full, adapter, tmp_path / "out")
    deeper = save_random_adapter(tiny_checkpoint("llama_tied", tmp_path / "deep"), tmp_path / "adapter2")
    with pytest.raises(CompressError, match="which the model has not got"):
        merge_adapter(full, deeper, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*"))


def test_an_adapter_that_was_not_recovered_is_refused(tmp_path: Path) -> None:
    full = Checkpoint(tiny_checkpoint("llama_gqa", tmp_path / "full"))
    adapter = save_random_adapter(full.path, tmp_path / "adapter")
    add_initial_factors(adapter)
    with pytest.raises(CompressError, match="Recover it first"):
        merge_adapter(full, adapter, tmp_path / "out")
