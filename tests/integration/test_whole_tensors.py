"""Whole tensors that PEFT trained on a small model, before or after its alignment: what the full model gets of them."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from compress.errors import CompressError
from compress.pipelines.settings import Common
from tests.integration.common import PRUNING, TRAINING, run
from tests.tiny import tiny_checkpoint

LOOP = {key: TRAINING[key] for key in ("steps", "micro_batch", "accumulation", "sequence")} | {"lr": 0.02}
PRUNE: dict[str, Any] = PRUNING | {"criterion": "magnitude", "repair": "none", "repair_steps": 0, "trials": 1}
PRUNE |= {"targets": "mlp"}
NORM, TOKENS = "model.norm.weight", [5, 9]
PREFIX = "base_model.model."


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> dict[str, Path]:
    """A full model, what pruning left of it and the same aligned, in one chain."""
    place = tmp_path_factory.mktemp("aligned")
    full = tiny_checkpoint("llama_gqa", place / "full")
    common = Common(run=place / "run", model=str(full), data=str(text_file), dtype="float32", effort="quick")
    run("prune", common, ratio=0.4, **PRUNE)
    run("align", common, **LOOP)
    return {
        "full": full,
        "run": place / "run",
        "pruned": place / "run" / "01-prune",
        "aligned": place / "run" / "02-align",
    }


@pytest.fixture
def common(folders: dict[str, Path], tmp_path: Path, text_file: Path) -> Common:
    shutil.copytree(folders["run"], tmp_path / "run")
    return Common(
        run=tmp_path / "run",
        model=str(folders["full"]),
        data=str(text_file),
        dtype="float32",
        effort="quick",
    )


def trained(base: Path, folder: Path, **options: Any) -> Path:
    """An adapter with a whole norm and whole rows of the embedding, all of it moved from where it began."""
    given: dict[str, Any] = {"modules_to_save": ["norm"], "trainable_token_indices": TOKENS} | options
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj", "down_proj"], **given),
    )
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(str(folder))
    return folder


def name_base(adapter: Path, name: str) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": name}))


def tensors(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("elsewhere", [False, True])
@pytest.mark.parametrize("base", ["pruned", "aligned"])
def test_the_change_is_counted_from_the_model_it_was_trained_on(
    base: str, elsewhere: bool, folders: dict[str, Path], common: Common, tmp_path: Path
) -> None:
    """Against the full model, changed by hand; the folder that is named is the chain's, or a copy somewhere else."""
    own, full = tensors(folders[base]), tensors(folders["full"])
    embedding = "model.embed_tokens.weight"
    assert (tensors(folders["aligned"])[NORM] - full[NORM]).abs().max() > 1e-3
    adapter = trained(folders[base], tmp_path / "adapter")
    if not elsewhere:
        name_base(adapter, str(common.run / folders[base].name))
    out = Path(run("recover", common, adapter=str(adapter))["path"])
    saved = load_file(adapter / "adapter_model.safetensors")
    kept = load_file(folders["pruned"] / "structure.safetensors")
    by_hand = AutoModelForCausalLM.from_pretrained(folders["full"], dtype=torch.float32).eval()
    weights = dict(by_hand.named_parameters())
    norms = [name for name in weights if name.endswith("norm.weight")]
    rows = next(value for name, value in saved.items() if "trainable_tokens" in name)
    with torch.no_grad():
        for name in norms:
            weights[name] += saved[PREFIX + name] - own[name]
        for number, token in enumerate(TOKENS):
            weights[embedding][token] += rows[number] - own[embedding][token]
        for layer in range(by_hand.config.num_hidden_layers):
            for linear in ("self_attn.q_proj", "mlp.down_proj"):
                module = f"model.layers.{layer}.{linear}"
                a, b = (saved[f"{PREFIX}{module}.lora_{side}.weight"] for side in "AB")
                wide = linear.startswith("self")  # heads were not pruned
                channels = range(a.shape[1]) if wide else kept[f"layers.{layer}.channels"].tolist()
                for place, channel in enumerate(channels):
                    weights[f"{module}.weight"][:, channel] += 3.0 * b @ a[:, place]
    ids = torch.tensor([[1, 5, 9, 3, 77, 5]])
    loaded = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(folders["full"], dtype=torch.float32), str(out)
    ).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, by_hand(ids).logits, rtol=1e-4, atol=1e-4)


def test_what_does_not_say_where_it_was_trained_is_refused_if_that_matters(
    folders: dict[str, Path], common: Common, tmp_path: Path
) -> None:
    adapter = trained(folders["pruned"], tmp_path / "adapter", trainable_token_indices=None)
    for name in ("", "somebody/small", str(folders["full"])):
        name_base(adapter, name)
        with pytest.raises(
            CompressError,
            match=r"model.layers.0.input_layernorm.weight, which 02-align has in other values than 01-prune",
        ) as refused:
            run("recover", common, adapter=str(adapter))
        assert "base_model_name_or_path" in refused.value.remedy
    assert not (common.run / "03-recover").exists()
    plain = trained(folders["pruned"], tmp_path / "plain", modules_to_save=None, trainable_token_indices=None)
    name_base(plain, "somebody/small")
    assert run("recover", common, adapter=str(plain))["metrics"]["modules"] > 0
    # the models of a chain that was not aligned have the same norms
    one = replace(common, run=tmp_path / "one")
    run("prune", one, ratio=0.4, **PRUNE)
    run("quantize", one, budget="6bit", rank="0", objective="frobenius", iterations=1)
    out = Path(run("recover", one, adapter=str(adapter))["path"])
    found, saved = (load_file(folder / "adapter_model.safetensors") for folder in (out, adapter))
    torch.testing.assert_close(found[PREFIX + NORM], saved[PREFIX + NORM])
