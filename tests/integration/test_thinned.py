"""``compress prune --shape semi`` and ``unstructured`` in a chain: zeros, masks, training with them, recovery."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from compress.errors import CompressError, UsageError
from compress.model.checkpoint import Checkpoint
from compress.pipelines.dispatch import run_verb
from compress.pipelines.settings import Common
from compress.prune.weight_masks import load_masks
from compress.structure import StructureMap
from tests.integration.common import TRAINING, assert_recorded, logits, run
from tests.integration.test_align import LOOP
from tests.tiny import tiny_checkpoint

pytestmark = pytest.mark.usefixtures("forked_reopen")


def start(tmp_path: Path, text_file: Path, kind: str = "llama_gqa") -> Common:
    full = tiny_checkpoint(kind, tmp_path / "full")
    return Common(run=tmp_path / "run", model=str(full), data=str(text_file), dtype="float32", effort="quick")


@pytest.mark.parametrize(
    ("kind", "given"),
    [
        pytest.param(
            "llama_tied",
            {"shape": "semi", "criterion": "wanda", "calibration_tokens": 512, "skip_first": 1},
            marks=pytest.mark.slow,
        ),
        ("llama_gqa", {"shape": "semi", "pattern": "2:4", "criterion": "magnitude", "skip_last": 0}),
        ("phi3", {"shape": "unstructured", "criterion": "wanda", "ratio": 0.3, "skip_last": 0}),
    ],
)
def test_a_thinned_chain(kind: str, given: dict[str, Any], tmp_path: Path, text_file: Path) -> None:
    common = start(tmp_path, text_file, kind)
    pruned = run("prune", common, **given)
    folder, full = Path(pruned["path"]), Checkpoint(tmp_path / "full")
    small, masks = Checkpoint(folder), load_masks(folder)
    assert masks is not None
    layers = 3 if kind == "llama_tied" else 2
    touched = range(given.get("skip_first", 0), layers - given.get("skip_last", 1))
    assert {name.split(".")[2] for name in masks.packed} == {str(layer) for layer in touched}
    for name in full.names:
        mask = masks.mask(name.removesuffix(".weight"))
        weight = full.read(name)
        assert torch.equal(small.read(name), weight if mask is None else weight * mask)
        if mask is not None:
            of = {"semi": int(given.get("pattern", "4:8")[-1]), "unstructured": 0}[given["shape"]]
            if of:
                assert (mask.view(-1, of).sum(dim=1) == of // 2).all()
            else:
                assert float((~mask).float().mean()) == pytest.approx(0.3, abs=0.02)
    assert pruned["metrics"]["masked_weights"] == masks.removed
    assert StructureMap.load(folder / "structure.safetensors").is_identity

    rows = ["original", "pruned", "aligned", "small + adapter", "full + recovered"]
    aligned = Checkpoint(Path(run("align", common, **LOOP)["path"]))
    for name in masks.packed:
        mask = masks.mask(name)
        assert mask is not None
        assert (aligned.read(f"{name}.weight")[~mask] == 0).all()
    if kind == "llama_gqa":
        rows.insert(3, "quantized")
        run("quantize", common, budget="8bit", rank="0", calibration_tokens=512)
    run("train", common, **(TRAINING | {"lr": 1e-2}))
    recovered = Path(run("recover", common, merge=True)["path"])
    evaluated = run("eval", common, sequence=32, windows=2)["metrics"]
    assert [row["name"] for row in evaluated["rows"]] == rows
    verified = run_verb("verify", common, {}, quiet=True)
    assert verified["ok"], [check for check in verified["checks"] if check["result"] == "differs"]

    trained = next((tmp_path / "run").glob("*-train"))
    factors, again = (load_file(p / "adapter_model.safetensors") for p in (trained, recovered))
    assert factors.keys() == again.keys()
    assert all(torch.equal(factors[name], again[name]) for name in factors)
    assert load_masks(recovered) is None
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "full", dtype=torch.float32)
    assert_recorded(PeftModel.from_pretrained(whole, recovered).eval(), recovered)
    assert_recorded(
        AutoModelForCausalLM.from_pretrained(recovered / "merged", dtype=torch.float32), recovered
    )
    page = Path(run("report", common)["report"]).read_text(encoding="utf-8")
    assert "of the decoder linear weights are zero" in page


def test_the_trained_small_model_computes_with_masked_products(tmp_path: Path, text_file: Path) -> None:
    """What the stage recorded is not what stock PEFT makes of the adapter, which knows of no masks."""
    common = start(tmp_path, text_file)
    folder = Path(
        run("prune", common, shape="unstructured", criterion="magnitude", ratio=0.5, skip_last=0)["path"]
    )
    trained = Path(run("train", common, **(TRAINING | {"lr": 1e-1}))["path"])
    record = load_file(trained / "logits.safetensors")
    small = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    stock = logits(PeftModel.from_pretrained(small, trained).eval(), record["input_ids"])
    assert not torch.allclose(stock, record["logits"], atol=1e-3)
    change = load_file(folder / "model.safetensors")
    name = next(n for n, t in change.items() if n.endswith("up_proj.weight"))
    change[name][change[name] == 0] = 1e-3
    from safetensors.torch import save_file

    save_file(change, folder / "model.safetensors", metadata={"format": "pt"})
    wrong = [c for c in run_verb("verify", common, {}, quiet=True)["checks"] if c["result"] == "differs"]
    assert any(c["check"] == "masks" and "are not zero" in c["detail"] for c in wrong)


def test_what_single_weights_cannot_have_is_refused(tmp_path: Path, text_file: Path) -> None:
    common = start(tmp_path, text_file)
    for given, message in (
        ({"shape": "semi"}, "obs scores groups"),
        ({"shape": "semi", "criterion": "wanda", "ratio": 0.5}, "the pattern decides"),
        ({"shape": "semi", "criterion": "wanda", "pattern": "8:4"}, "is not understood"),
        ({"shape": "unstructured", "criterion": "wanda", "size": "1MB"}, "leaves the sizes as they are"),
        ({"shape": "unstructured", "criterion": "wanda", "skip_first": 2}, "no layer can be pruned"),
    ):
        with pytest.raises(UsageError, match=message):
            run("prune", common, **given)
    for given, message in (
        ({"shape": "semi", "criterion": "wanda", "pattern": "3:7"}, "Rows of 64 weights"),
        ({"shape": "unstructured", "criterion": "wanda", "ratio": 0.9}, "cannot come from matrices"),
    ):
        with pytest.raises(CompressError, match=message):
            run("prune", common, **given)
    assert not (tmp_path / "run").exists()
    run("prune", common, shape="semi", criterion="magnitude")
    with pytest.raises(UsageError, match="GaLore's updates would fill the zeros"):
        run("align", common, optimizer="galore", **LOOP)
    run("quantize", common, budget="8bit", rank="4", objective="frobenius", iterations=1)
    with pytest.raises(UsageError, match="have its zeros"):
        run("train", common, method="lq", **TRAINING)
