"""The recipe ``qloram``, which has every step of ``loram`` too, on a tiny model of eight layers with few tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, LlamaConfig

from compress.pipelines.dispatch import run_verb
from compress.pipelines.recipe import FOLDER
from compress.pipelines.settings import Common
from compress.structure import StructureMap
from tests.integration.common import run
from tests.tiny import tiny_tokenizer

FEW = {"steps": 2, "micro_batch": 2, "accumulation": 1, "sequence": 32, "calibration_tokens": 512}


def eight_layers(folder: Path) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=128,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=8,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=1024,
        )
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.usefixtures("forked_reopen")
def test_the_recipe_runs(tmp_path: Path, text_file: Path) -> None:
    recipe = yaml.safe_load((FOLDER / "qloram.yaml").read_text(encoding="utf-8"))
    plain = yaml.safe_load((FOLDER / "loram.yaml").read_text(encoding="utf-8"))
    verbs = [next(iter(step)) if isinstance(step, dict) else step for step in recipe["steps"]]
    others = [next(iter(step)) if isinstance(step, dict) else step for step in plain["steps"]]
    assert [verb for verb in verbs if verb != "quantize"] == others
    for step in recipe["steps"]:
        if isinstance(step, dict):
            (settings,) = step.values()
            settings.pop("data", None)
            settings |= {k: v for k, v in FEW.items() if k in settings or k == "calibration_tokens"}
            if next(iter(step)) in ("align", "train"):
                settings.pop("calibration_tokens")
            if "ratio" in settings:  # one of two KV groups must stay
                settings["ratio"] = plain["steps"][0]["prune"]["ratio"]
            if "budget" in settings:  # rows of 32 weights: a scale for each weighs more than in a real model
                settings |= {"budget": "4.5bit", "menu": "quick"}
    file = tmp_path / "short.yaml"
    file.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    common = Common(
        run=tmp_path / "run", model=str(eight_layers(tmp_path / "full")), data=str(text_file), dtype="float32"
    )
    stages = run_verb("run", common, {"recipe": str(file)}, quiet=True)["stages"]
    assert [stage["verb"] for stage in stages] == verbs
    structure = StructureMap.load(tmp_path / "run" / "03-quantize" / "structure.safetensors")
    whole = [i for i, s in enumerate(structure.shapes) if (s.kv_heads, s.channels) == (2, 64)]
    assert whole == [0, 1, 2, 3, 6, 7]
    assert stages[4]["metrics"]["modules"] == 8 * 7 + 1
    assert run("verify", common)["ok"]
