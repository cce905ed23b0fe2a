"""A recovered adapter in plain PEFT: it loads, merges and unloads with the logits of ours, whatever it started from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM

from compress.adapters.attach import attach_factors, attach_lora, attach_pissa, load_adapter, save_adapter
from compress.adapters.merge import merge_adapter
from compress.adapters.recover import recover_adapter
from compress.adapters.train import fit
from compress.model.checkpoint import Checkpoint, checkpoint_architecture
from compress.model.load import load_model
from compress.structure import kept_columns, kept_rows
from tests.unit.adapters.common import Pair, make_pair
from tests.unit.adapters.test_align import CONFIG
from tests.unit.adapters.test_attach_factors import quantised
from tests.unit.adapters.test_train import windows

IDS = torch.randint(0, 128, (2, 9), generator=torch.Generator().manual_seed(5))


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=IDS).logits
    return found


def trained(pair: Pair, start: str, rslora: bool, folder: Path) -> tuple[Any, Any, Path]:
    """The small model before training, the same with its trained adapter, and where the adapter was saved."""
    arch = checkpoint_architecture(Checkpoint(pair.small))
    small = load_model(pair.small, dtype=torch.float32)
    before = load_model(pair.small, dtype=torch.float32)
    initial = None
    if start == "lq":
        small, before = quantised(small, arch), quantised(before, arch)
        adapted, initial = attach_factors(small, arch, rank=4, alpha=6, rank_stabilized=rslora, seed=1)
    elif start == "pissa":
        adapted, initial = attach_pissa(small, arch, rank=4, alpha=6, rank_stabilized=rslora)
    else:
        adapted = attach_lora(
            small, arch, rank=4, alpha=6, dropout=0.0, rank_stabilized=rslora, targets=["all", "lm_head"]
        )
    fit(adapted, windows(), CONFIG)
    return before, adapted, save_adapter(adapted, folder, base_name="small", initial=initial)


def weight_of(model: nn.Module, module: str) -> torch.Tensor:
    """What a linear multiplies with, by its outputs for unit inputs, [out, in]."""
    linear: Any = model.get_submodule(module)
    width = linear.in_features
    with torch.no_grad():
        bias = 0 if getattr(linear, "bias", None) is None else linear.bias
        outputs: torch.Tensor = linear(torch.eye(width)) - bias
    return outputs.T


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("start", ["zero", "lq", "pissa"])
def test_the_full_model_gets_what_training_changed_in_the_small_one(
    start: str, rslora: bool, tmp_path: Path
) -> None:
    """Nothing here uses a rule of recovery: each linear's change is read off its outputs before and after."""
    pair = make_pair("llama_gqa", tmp_path)
    before, adapted, folder = trained(pair, start, rslora, tmp_path / "adapter")
    recover_adapter(folder, pair.structure, pair.arch, pair.full, tmp_path / "out", full_name="org/full")
    by_hand = load_model(pair.full.path, dtype=torch.float32)
    inner = adapted.eval().get_base_model()
    with torch.no_grad():
        for module, layer, spec in pair.linears():
            change = weight_of(inner, module) - weight_of(before, module)
            rows = kept_rows(pair.arch, spec, pair.structure.layers[layer])
            columns = kept_columns(pair.arch, spec, pair.structure.layers[layer])
            weight = by_hand.get_submodule(module).weight
            every_row = torch.arange(weight.shape[0]) if rows is None else rows
            every_column = torch.arange(weight.shape[1]) if columns is None else columns
            weight[every_row[:, None], every_column] += change
        by_hand.lm_head.weight += weight_of(inner, "lm_head") - weight_of(before, "lm_head")
    untouched = logits(load_model(pair.full.path, dtype=torch.float32))
    expected = logits(by_hand)
    assert (expected - untouched).norm() > 1e-3 * untouched.norm()

    stock = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(pair.full.path, dtype=torch.float32), tmp_path / "out"
    )
    torch.testing.assert_close(logits(stock), expected, rtol=1e-3, atol=2e-3)
    ours = load_adapter(load_model(pair.full.path, dtype=torch.float32), tmp_path / "out")
    torch.testing.assert_close(logits(ours), logits(stock), rtol=1e-5, atol=1e-5)
    merge_adapter(pair.full, tmp_path / "out", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(logits(merged), logits(ours), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits(stock.merge_and_unload()), logits(ours), rtol=1e-4, atol=1e-4)
    again = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(pair.full.path, dtype=torch.float32), tmp_path / "out"
    )
    torch.testing.assert_close(logits(again.unload()), untouched, rtol=0, atol=0)
