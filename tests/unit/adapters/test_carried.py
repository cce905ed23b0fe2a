"""What an adapter holds beside its factor pairs, on the full model: biases, rows of embeddings, embedding factors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from compress.adapters.adapter_file import CONFIG_FILE, PREFIX, WEIGHTS_FILE
from compress.adapters.merge import merge_adapter
from compress.adapters.recover import recover_adapter
from compress.errors import CompressError
from compress.model.checkpoint import Checkpoint
from compress.model.load import load_model
from compress.structure import kept_rows
from tests.unit.adapters.common import Pair, add_initial_factors, make_pair, save_random_adapter

EMBEDDING = "model.embed_tokens"


def recover(pair: Pair, adapter: Path, out: Path, **options: Any) -> dict[str, Tensor]:
    recover_adapter(adapter, pair.structure, pair.arch, pair.full, out, full_name="org/full", **options)
    return load_file(out / WEIGHTS_FILE)


def move(pair: Pair, part: str) -> None:
    """Let the small model's tensors of such names differ from the full one's, as alignment does."""
    stored = load_file(pair.small / "model.safetensors")
    generator = torch.Generator().manual_seed(11)
    stored = {
        name: tensor + 0.3 * torch.randn(tensor.shape, generator=generator) if part in name else tensor
        for name, tensor in stored.items()
    }
    save_file(stored, pair.small / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("kind", ["qwen2", "gpt2"])
def test_trained_biases(kind: str, given: bool, tmp_path: Path) -> None:
    """Each number of a bias in turn: where it was kept, what training changed in it; elsewhere the full model's own."""
    pair = make_pair(kind, tmp_path, heads=kind != "gpt2")
    if given:
        move(pair, ".bias")
    adapter = save_random_adapter(pair.small, tmp_path / "adapter", bias="all", fan_in_fan_out=kind == "gpt2")
    base = Checkpoint(pair.small)
    found = recover(pair, adapter, tmp_path / "out", small_base=base if given else None)
    small, cut = load_file(adapter / WEIGHTS_FILE), 0
    linears = [(name, i, spec) for name, i, spec in pair.linears() if spec.bias]
    assert {f"{name}.bias" for name, *_ in linears} <= {
        n.removeprefix(PREFIX).replace(".base_layer.bias", ".bias") for n in small
    }
    for name, index, spec in linears:
        key = f"{PREFIX}{name}.base_layer.bias"
        full = pair.full.read(f"{name}.bias")
        rows = kept_rows(pair.arch, spec, pair.structure.layers[index])
        at = list(range(len(full))) if rows is None else rows.tolist()
        cut += len(full) - len(at)
        wanted = full.clone()
        before = base.read(f"{name}.bias") if given else full[at]
        for number, row in enumerate(at):
            wanted[row] = full[row] + (small[key][number] - before[number])
        torch.testing.assert_close(found[key], wanted, rtol=1e-6, atol=1e-6)
        assert not torch.allclose(found[key], full, atol=1e-3)
    assert cut > 0
    loaded = PeftModel.from_pretrained(load_model(pair.full.path), str(tmp_path / "out")).eval()
    merge_adapter(pair.full, tmp_path / "out", tmp_path / "merged")
    ids = torch.randint(0, 128, (2, 9), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        torch.testing.assert_close(
            load_model(tmp_path / "merged", dtype=torch.float32)(ids).logits,
            loaded(ids).logits,
            rtol=1e-4,
            atol=1e-4,
        )


def test_a_bias_that_the_full_model_has_not_got(tmp_path: Path) -> None:
    """As after repair by biases: there is nothing to add the change to."""
    pair = make_pair("qwen2", tmp_path)
    adapter = save_random_adapter(pair.small, tmp_path / "adapter", target_modules=["q_proj"])
    tensors = load_file(adapter / WEIGHTS_FILE)
    for module, size in (
        ("self_attn.o_proj", pair.arch.hidden),
        ("mlp.up_proj", pair.structure.shapes[0].channels),
    ):
        name = f"{PREFIX}model.layers.0.{module}.bias"
        save_file(tensors | {name: torch.ones(size)}, adapter / WEIGHTS_FILE, metadata={"format": "pt"})
        with pytest.raises(
            CompressError, match=rf"{module}\.bias cannot be recovered: .* do not both have it"
        ):
            recover(pair, adapter, tmp_path / "out", small_base=Checkpoint(pair.small))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("as_list", [False, True])
@pytest.mark.parametrize("kind", ["llama_gqa", "llama_tied"])
def test_trained_tokens(kind: str, as_list: bool, aligned: bool, tmp_path: Path) -> None:
    """PEFT stores whole rows of the small model's embedding; the full model gets what training changed in them."""
    pair = make_pair(kind, tmp_path)
    if aligned:
        move(pair, "embed_tokens")
    tokens = [7, 3, 100]
    adapter = save_random_adapter(
        pair.small,
        tmp_path / "adapter",
        target_modules=["q_proj"],
        trainable_token_indices=tokens if as_list else {"embed_tokens": tokens},
    )
    key = f"{PREFIX}{EMBEDDING}.token_adapter.trainable_tokens_delta"
    trained, base = load_file(adapter / WEIGHTS_FILE)[key], Checkpoint(pair.small)
    name = f"{EMBEDDING}.weight"
    found = recover(pair, adapter, tmp_path / "out", small_base=base)[key]
    wanted = pair.full.read(name)[tokens] + trained - base.read(name)[tokens]
    torch.testing.assert_close(found, wanted)
    assert torch.allclose(found, trained, atol=1e-6) is not aligned
    model: Any = PeftModel.from_pretrained(load_model(pair.full.path), str(tmp_path / "out")).eval()
    embedded = model.get_base_model().get_input_embeddings()(torch.tensor([*tokens, 5]))
    torch.testing.assert_close(embedded, torch.cat([wanted, pair.full.read(name)[[5]]]))
    with pytest.raises(CompressError, match=r"holds single rows of model\.embed_tokens"):
        merge_adapter(pair.full, tmp_path / "out", tmp_path / "merged")


def test_trained_tokens_that_cannot_be_placed(tmp_path: Path) -> None:
    pair = make_pair("llama_gqa", tmp_path)
    adapter = save_random_adapter(
        pair.small, tmp_path / "adapter", target_modules=["q_proj"], trainable_token_indices=[7, 3]
    )
    config = json.loads((adapter / CONFIG_FILE).read_text())
    (adapter / CONFIG_FILE).write_text(json.dumps(config | {"trainable_token_indices": [7]}))
    with pytest.raises(CompressError, match="trainable_tokens_delta cannot be recovered"):
        recover(pair, adapter, tmp_path / "out")
    tensors = load_file(adapter / WEIGHTS_FILE)
    key = next(name for name in tensors if "trainable_tokens" in name)
    tensors[f"{PREFIX}{EMBEDDING}.something_new"] = tensors.pop(key)
    save_file(tensors, adapter / WEIGHTS_FILE, metadata={"format": "pt"})
    with pytest.raises(
        CompressError, match="something_new cannot be recovered: it is of a kind that is not known"
    ):
        recover(pair, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("way", ["cut", "difference", "both"])
def test_embedding_factors_keep_their_rank_beside_others(way: str, rslora: bool, tmp_path: Path) -> None:
    """The linears change their rank, the embedding does not: PEFT loads both, and the embedding's delta is the same."""
    pair = make_pair("llama_gqa", tmp_path)
    adapter = save_random_adapter(
        pair.small, tmp_path / "adapter", target_modules=["q_proj", "embed_tokens"], r=8, use_rslora=rslora
    )
    if way != "cut":
        add_initial_factors(adapter, only="q_proj")
    recover(pair, adapter, tmp_path / "out", compress_rank=None if way == "difference" else 4)
    model = PeftModel.from_pretrained(load_model(pair.full.path), str(tmp_path / "out")).get_base_model()
    linear: Any = model.get_submodule("model.layers.0.self_attn.q_proj")
    embedding: Any = model.get_submodule(EMBEDDING)
    assert linear.r["default"] == (16 if way == "difference" else 4)
    assert embedding.r["default"] == 8
    small = load_file(adapter / WEIGHTS_FILE)
    factor_a, factor_b = (small[f"{PREFIX}{EMBEDDING}.lora_embedding_{side}"] for side in "AB")
    scale = 6 / 8**0.5 if rslora else 6 / 8
    torch.testing.assert_close(
        embedding.get_delta_weight("default"), (scale * factor_b @ factor_a).T, rtol=1e-5, atol=1e-6
    )
