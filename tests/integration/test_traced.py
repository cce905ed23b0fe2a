"""The chain on a family nobody declared: GPT-2, traced, whose linears are stored transposed (Conv1D)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import compress
from compress.errors import CompressError, UsageError
from compress.pipelines.settings import Common
from compress.structure import LayerShape, StructureMap
from tests.integration.common import PRUNING, TRAINING, assert_recorded, logits, run
from tests.tiny import tiny_checkpoint

MLP = ("mlp.c_fc", "mlp.c_proj")

pytestmark = pytest.mark.usefixtures("forked_reopen")


def chain(tmp_path: Path, text_file: Path) -> Common:
    full = tiny_checkpoint("gpt2", tmp_path / "full")
    return Common(
        run=tmp_path / "run", model=str(full), data=str(text_file), dtype="float32", threads=1, effort="quick"
    )


def opened(path: Path | str) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


@pytest.mark.parametrize("method", ["lora", "lq"])
def test_the_whole_chain(method: str, tmp_path: Path, text_file: Path) -> None:
    common = chain(tmp_path, text_file)
    with pytest.raises(CompressError, match="make up a head"):
        run("prune", common, ratio=0.4, targets="heads", **PRUNING)
    pruned = Path(run("prune", common, ratio=0.4, **PRUNING)["path"])
    quantized = run("quantize", common, budget="5bit", rank="4")
    run("train", common, method=method, **TRAINING)
    recovered = Path(run("recover", common, merge=True)["path"])

    assert_recorded(opened(pruned), pruned)
    assert_recorded(opened(quantized["path"]), Path(quantized["path"]))
    assert_recorded(PeftModel.from_pretrained(opened(tmp_path / "full"), recovered).eval(), recovered)
    assert_recorded(opened(recovered / "merged"), recovered)
    structure = StructureMap.load(pruned / "structure.safetensors")
    assert structure.uniform == LayerShape(kv_heads=4, queries=1, channels=80)
    assert quantized["metrics"]["stored_bits_per_weight"] <= 5
    stay = quantized["metrics"]["left_dense"]
    assert len(stay) == 4
    assert {name.rpartition(".h.")[2].partition(".")[2] for name in stay} == {
        "attn.c_attn.weight",
        "attn.c_proj.weight",
    }


@pytest.mark.parametrize(("objective", "bound"), [("frobenius", 0.15), ("fisher", 0.2), ("hessian", 0.3)])
def test_a_quantized_conv1d_computes_with_the_transposed_weight(
    objective: str, bound: float, tmp_path: Path, text_file: Path
) -> None:
    common = chain(tmp_path, text_file)
    stage = run("quantize", common, budget="5bit", rank="4", objective=objective)
    full, small = opened(tmp_path / "full"), opened(stage["path"])
    stored = load_file(Path(stage["path"]) / "model.safetensors")
    relative = {record["name"]: record["relative_error"] for record in stage["metrics"]["matrices"]}
    for layer in range(2):
        for name in MLP:
            module = f"transformer.h.{layer}.{name}"
            linear, dense = small.get_submodule(module), full.get_submodule(module)
            assert isinstance(linear, compress.LQLinear)
            assert stored[f"{module}.weight"].dtype == torch.uint8
            torch.testing.assert_close(linear.bias, dense.bias, rtol=0, atol=0)
            # from here on the full model computes with the decoded matrices, in its own orientation
            decoded, weight = linear.dequantized_weight().detach().T, dense.weight.detach()
            error = ((decoded - weight).norm() / weight.norm()).item()
            assert error == pytest.approx(relative[module], rel=1e-3)
            assert error < bound
            dense.weight.data.copy_(decoded)
    ids = torch.randint(0, 128, (2, 16), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(logits(small, ids), logits(full, ids), rtol=1e-4, atol=1e-4)


def test_windows_longer_than_the_positions_are_refused(tmp_path: Path, text_file: Path) -> None:
    common = chain(tmp_path, text_file)
    for verb, given in (
        ("prune", TRAINING | {"sequence": 512}),
        ("train", TRAINING | {"sequence": 512}),
        ("eval", {"sequence": 512, "windows": 2}),
    ):
        with pytest.raises(UsageError, match="512 tokens are longer than the model's 256 positions"):
            run(verb, common, **given)
    assert not list((tmp_path / "run").glob("*.partial"))
