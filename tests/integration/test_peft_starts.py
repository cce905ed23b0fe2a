"""Adapters that PEFT started from a part of the small model, with their start saved by the lines of the tutorial."""

from __future__ import annotations

import copy
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import layer as peft_layer
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from compress.errors import CompressError
from compress.pipelines.settings import Common
from tests.integration.common import PRUNING, run
from tests.sources import ROOT
from tests.tiny import tiny_checkpoint

PRUNE: dict[str, Any] = PRUNING | {"criterion": "magnitude", "repair": "none", "repair_steps": 0, "trials": 1}
TRAIN = "...  # train model\n"
LINEARS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)

pytestmark = pytest.mark.usefixtures("forked_reopen")


def lines() -> str:
    """The block of the tutorial."""
    text = (ROOT / "docs" / "tutorials" / "loram.md").read_text(encoding="utf-8")
    (code,) = (
        block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "initial_factors" in block
    )
    assert TRAIN in code
    return str(code)


def coarse_loftq(
    weight: Tensor, num_bits: int, reduced_rank: int, num_iter: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """What PEFT asks of bitsandbytes on a GPU: a rounded weight, and A and B for the rest; one pass."""
    step = weight.abs().max() / 2 ** (num_bits - 1)
    rounded = (weight / step).round() * step
    left, values, right = torch.linalg.svd(weight - rounded, full_matrices=False)
    root = values[:reduced_rank].sqrt()
    return rounded, root[:, None] * right[:reduced_rank], left[:, :reduced_rank] * root


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> Path:
    """A folder with a full model, and a small one in which half of the channels and one KV group are gone."""
    place = tmp_path_factory.mktemp("models")
    full = tiny_checkpoint("llama_gqa", place / "full")
    common = Common(run=place / "run", model=str(full), data=str(text_file), dtype="float32", effort="quick")
    parts = {"shape": "local", "ratio_of": "parts", "skip_first": 0, "skip_last": 0}
    run("prune", common, ratio=0.5, **PRUNE | parts)
    shutil.copytree(place / "run" / "01-prune", place / "small")
    (place / "small" / "stage.json").unlink()
    return place


def product(factors: dict[str, Tensor], name: str) -> Tensor:
    """B A of a module, by the name of its A."""
    return factors[name.replace("lora_A", "lora_B")] @ factors[name]


def changed_by_training(before: Any, after: Any) -> dict[str, Tensor]:
    """What the small model's effective weights are after training that they were not at its start."""
    first, last = (
        {k: v.detach().clone() for k, v in copy.deepcopy(m).merge_and_unload().state_dict().items()}
        for m in (before, after)
    )
    return {name: last[name] - first[name] for name in first}


@pytest.mark.parametrize("start", ["pissa", "olora", "loftq"])
def test_the_lines_of_the_tutorial(
    start: str,
    models: Path,
    tmp_path: Path,
    text_file: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The full model with the recovered adapter is the full model with what training changed put in by hand."""
    for name in ("full", "small"):
        shutil.copytree(models / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    code = lines()
    if start == "loftq":
        monkeypatch.setattr(peft_layer, "loftq_init", coarse_loftq)
        code = code.replace('"pissa"', '"loftq", loftq_config=LoftQConfig(loftq_bits=4)')
        code = code.replace("import LoraConfig,", "import LoftQConfig, LoraConfig,")
    code = code.replace('"pissa"', f'"{start}"').replace(TRAIN, "train(model)\n")
    seen: list[dict[str, Tensor]] = []

    def train(model: Any) -> None:
        before, generator = copy.deepcopy(model), torch.Generator().manual_seed(5)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    assert "lora_" in name
                    parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
        seen.append(changed_by_training(before, model))

    scope: dict[str, Any] = {"train": train}
    exec(compile(code, "loram.md", "exec"), scope)
    common = Common(
        run=tmp_path / "theirs",
        model=str(tmp_path / "small"),
        data=str(text_file),
        dtype="float32",
        effort="quick",
    )
    recovered = run("recover", common, adapter=str(tmp_path / "my-adapter"), onto=str(tmp_path / "full"))
    metrics = recovered["metrics"]
    assert (metrics["rank"], metrics["differences"]) == (16, 2 * len(LINEARS))
    assert metrics["shorter"]["rank"] == 8

    (change,) = seen
    by_hand: Any = AutoModelForCausalLM.from_pretrained("full", dtype=torch.float32)
    config, kept = by_hand.config, load_file("small/structure.safetensors")
    width = config.hidden_size // config.num_attention_heads
    queries = config.num_attention_heads // config.num_key_value_heads
    with torch.no_grad():
        for number, block in enumerate(by_hand.model.layers):
            groups, channels = (kept[f"layers.{number}.{part}"] for part in ("kv_groups", "channels"))
            assert len(groups) < config.num_key_value_heads
            rows = {
                "kv": [g * width + i for g in groups.tolist() for i in range(width)],
                "q": [g * queries * width + i for g in groups.tolist() for i in range(queries * width)],
                "mlp": channels.tolist(),
            }
            for linear in LINEARS:
                name = linear.rpartition(".")[2]
                at = rows[
                    "mlp" if linear.startswith("mlp") else "kv" if name in ("k_proj", "v_proj") else "q"
                ]
                weight = block.get_submodule(linear).weight
                delta = change[f"model.layers.{number}.{linear}.weight"]
                for place, index in enumerate(at):
                    if name in ("o_proj", "down_proj"):
                        weight[:, index] += delta[:, place]
                    else:
                        weight[index] += delta[place]
    plain = AutoModelForCausalLM.from_pretrained("full", dtype=torch.float32)
    loaded = PeftModel.from_pretrained(copy.deepcopy(plain), recovered["path"]).eval()
    ids = torch.tensor([[1, 5, 9, 3, 77, 5]])
    with torch.no_grad():
        wanted, found, untrained = (m.eval()(ids).logits for m in (by_hand, loaded, plain))
    torch.testing.assert_close(found, wanted, rtol=2e-4, atol=2e-4)
    assert (wanted - untrained).abs().max() > 0.1

    # the start is made again, where it was not kept
    again = get_peft_model(
        AutoModelForCausalLM.from_pretrained("small", dtype="auto"),
        LoraConfig(**scope["config"].to_dict()),
    )
    factors, first = get_peft_model_state_dict(again), scope["start"]
    assert set(factors) == set(first)
    for name in (name for name in first if "lora_A" in name):
        torch.testing.assert_close(product(factors, name), product(first, name), rtol=1e-4, atol=1e-5)


def test_without_the_start_it_is_refused_and_told_what_to_write(
    models: Path, tmp_path: Path, text_file: Path
) -> None:
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(models / "small", dtype=torch.float32),
        LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], init_lora_weights="pissa"),
    )
    start = {
        name: factor.clone()
        for name, factor in get_peft_model_state_dict(model).items()
        if "layers.0" in name
    }
    model.save_pretrained(str(tmp_path / "mine"))
    common = Common(
        run=tmp_path / "run",
        model=str(models / "small"),
        data=str(text_file),
        dtype="float32",
        effort="quick",
    )
    given = {"adapter": str(tmp_path / "mine"), "onto": str(models / "full")}
    for kept in ({}, start):
        if kept:
            save_file(kept, tmp_path / "mine" / "initial_factors.safetensors")
        with pytest.raises(
            CompressError, match=r"those of model\.layers\.[01]\.self_attn\.q_proj were not kept"
        ) as no:
            run("recover", common, **given)
        assert "initial_factors.safetensors" in no.value.remedy
