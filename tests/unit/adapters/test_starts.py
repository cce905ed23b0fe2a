"""Where adapters start and how they scale: PiSSA, rsLoRA, adapters on the output matrix, tied or not."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from compress.adapters.adapter_file import CONFIG_FILE, INITIAL_FILE, AdapterFile
from compress.adapters.attach import attach_lora, attach_pissa, load_adapter, lora_delta, save_adapter
from compress.adapters.merge import merge_adapter
from compress.adapters.recover import recover_adapter
from compress.adapters.train import fit
from compress.errors import CompressError, UsageError
from compress.model.checkpoint import Checkpoint, checkpoint_architecture
from compress.model.load import load_model
from compress.structure import kept_columns, kept_rows
from tests.tiny import tiny_checkpoint, tiny_model
from tests.unit.adapters.common import Pair, make_pair
from tests.unit.adapters.test_align import CONFIG
from tests.unit.adapters.test_train import windows
from tests.unit.prune.common import model_architecture

IDS = torch.randint(0, 128, (2, 9), generator=torch.Generator().manual_seed(3))
TRAIN = replace(CONFIG, steps=4, lr=1e-2)


def trained_pissa(pair: Pair, folder: Path, **options: Any) -> tuple[Any, Path]:
    """A PiSSA adapter trained on the small model, and where it was saved."""
    small = load_model(pair.small, dtype=torch.float32)
    arch = checkpoint_architecture(Checkpoint(pair.small))
    adapted, initial = attach_pissa(small, arch, rank=3, alpha=5, **options)
    fit(adapted, windows(), TRAIN)
    return adapted, save_adapter(adapted, folder, base_name="small", initial=initial)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("kind", ["llama_gqa", "phi3", "gpt2"])
def test_pissa_starts_where_the_model_was(kind: str, rslora: bool) -> None:
    """The outputs are the model's own; no matrix of its rank is nearer than the delta, by singular values in float64.

    Not its entries: where two singular values are close, those of a decomposition in float32 depend on the processor.
    """
    model, plain = tiny_model(kind), tiny_model(kind)
    arch = model_architecture(model)
    adapted, initial = attach_pissa(model, arch, rank=3, alpha=5, rank_stabilized=rslora)
    torch.testing.assert_close(adapted.eval()(IDS).logits, plain(IDS).logits, rtol=1e-4, atol=1e-4)
    assert len(initial) == 2 * arch.layers * len(arch.linears)
    for spec in arch.linears:
        name = arch.module_name(0, spec)
        weight = plain.get_submodule(name).weight.detach().double()
        weight = weight.T if spec.transposed else weight
        values = torch.linalg.svdvals(weight)
        delta = lora_delta(adapted, name)
        assert delta is not None
        assert float(torch.linalg.svdvals(delta.double())[3]) <= 1e-6 * float(values[0])
        assert float((weight - delta.double()).norm()) <= (1 + 1e-6) * float(values[3:].norm())


@pytest.mark.parametrize("kind", ["llama_gqa", "gpt2"])
def test_a_saved_pissa_adapter_opens_here_and_in_stock_peft(kind: str, tmp_path: Path) -> None:
    pair = make_pair(kind, tmp_path, heads=kind != "gpt2")
    adapted, folder = trained_pissa(pair, tmp_path / "adapter")
    expected = adapted(IDS).logits
    ours = load_adapter(load_model(pair.small, dtype=torch.float32), folder)
    torch.testing.assert_close(ours(IDS).logits, expected, rtol=1e-4, atol=1e-4)
    stock = AutoModelForCausalLM.from_pretrained(pair.small, dtype=torch.float32)
    torch.testing.assert_close(
        PeftModel.from_pretrained(stock, folder).eval()(IDS).logits, expected, rtol=1e-3, atol=1e-3
    )
    (folder / INITIAL_FILE).unlink()
    with pytest.raises(CompressError, match="no initial factors were kept"):
        load_adapter(load_model(pair.small, dtype=torch.float32), folder)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("kind", ["llama_gqa", "phi3"])
def test_recovering_pissa_gives_the_full_model_what_training_changed(
    kind: str, rslora: bool, tmp_path: Path
) -> None:
    """The full model's logits against one whose weights got, by hand, what the small model's weights gained."""
    pair = make_pair(kind, tmp_path)
    adapted, folder = trained_pissa(pair, tmp_path / "adapter", rank_stabilized=rslora)
    report = recover_adapter(
        folder, pair.structure, pair.arch, pair.full, tmp_path / "out", full_name="org/full"
    )
    assert (report.max_rank, report.differences) == (6, report.modules)
    config = json.loads((tmp_path / "out" / CONFIG_FILE).read_text())
    assert (config["r"], config["lora_alpha"]) == (6, pytest.approx(5 * 2**0.5) if rslora else 10)
    small, by_hand = load_model(pair.small, dtype=torch.float32), load_model(pair.full.path)
    for module, layer, spec in pair.linears():
        peft_layer = adapted.get_base_model().get_submodule(module)
        delta = lora_delta(adapted, module)
        assert delta is not None
        now = peft_layer.base_layer.weight.detach() + delta
        gained = now - small.get_submodule(module).weight.detach()
        rows = kept_rows(pair.arch, spec, pair.structure.layers[layer])
        columns = kept_columns(pair.arch, spec, pair.structure.layers[layer])
        weight = by_hand.get_submodule(module).weight.detach()
        at = (
            torch.arange(weight.shape[0]) if rows is None else rows,
            torch.arange(weight.shape[1]) if columns is None else columns,
        )
        weight[at[0][:, None], at[1]] += gained
    recovered = PeftModel.from_pretrained(load_model(pair.full.path), tmp_path / "out").eval()
    before = load_model(pair.full.path)(IDS).logits
    expected = by_hand(IDS).logits
    assert not torch.allclose(before, expected, atol=1e-2)
    torch.testing.assert_close(recovered(IDS).logits, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["llama_gqa", "llama_tied", "gpt2"])
def test_an_adapter_on_the_output_matrix(kind: str, tmp_path: Path) -> None:
    """Trained, recovered and merged; a tied output matrix becomes one of its own, the embedding stays."""
    pair = make_pair(kind, tmp_path, heads=kind != "gpt2")
    small = load_model(pair.small, dtype=torch.float32)
    arch = checkpoint_architecture(Checkpoint(pair.small))
    adapted = attach_lora(small, arch, rank=2, alpha=4, dropout=0.0, targets=["all", "lm_head"], seed=1)
    fit(adapted, windows(), TRAIN)
    folder = save_adapter(adapted, tmp_path / "adapter", base_name="small")
    torch.testing.assert_close(
        load_adapter(load_model(pair.small, dtype=torch.float32), folder)(IDS).logits,
        adapted(IDS).logits,
        rtol=1e-4,
        atol=1e-4,
    )
    with AdapterFile(folder) as file:
        assert "lm_head" in file.modules
        assert file.factors("lm_head")[1].any()
    recover_adapter(folder, pair.structure, pair.arch, pair.full, tmp_path / "out", full_name="org/full")
    full = load_adapter(load_model(pair.full.path, dtype=torch.float32), tmp_path / "out")
    merge_adapter(pair.full, tmp_path / "out", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(merged(IDS).logits, full(IDS).logits, rtol=1e-4, atol=1e-4)
    written = Checkpoint(tmp_path / "merged")
    assert torch.equal(written.read(pair.arch.embedding), pair.full.read(pair.arch.embedding))
    assert not torch.equal(written.read("lm_head.weight"), pair.full.read(pair.arch.embedding))


def test_what_pissa_cannot_start_from(tmp_path: Path) -> None:
    tied = tiny_model("llama_tied")
    with pytest.raises(CompressError, match="tied to the embedding"):
        attach_pissa(tied, model_architecture(tied), targets=["lm_head"])
    model = tiny_model("llama_gqa")
    arch = model_architecture(model)
    with pytest.raises(UsageError, match="rank is 0"):
        attach_pissa(model, arch, rank=0)
    with pytest.raises(UsageError, match=r"no adapter target qkv\."):
        attach_pissa(model, arch, targets=["q", "qkv"])
    with pytest.raises(UsageError, match="no adapter target at all"):
        attach_lora(model, arch, targets=())


def test_rank_stabilized_adapters_keep_their_scale(tmp_path: Path) -> None:
    source = tiny_checkpoint("llama_gqa", tmp_path / "model")
    model = load_model(source)
    adapted = attach_lora(model, model_architecture(model), rank=4, alpha=6, rank_stabilized=True)
    save_adapter(adapted, tmp_path / "adapter", base_name="model")
    with AdapterFile(tmp_path / "adapter") as file:
        assert {file.scaling(m).value for m in file.modules} == {3.0}
