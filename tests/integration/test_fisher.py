"""The Fisher objective from end to end: what it minds, factors in 16 bits, and everything that follows a stage."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from compress.__main__ import app
from compress.model.checkpoint import Checkpoint, checkpoint_architecture
from compress.pipelines.fisher_files import FisherFiles
from compress.pipelines.matrices import matrices_of, read_matrix
from compress.pipelines.model_input import ModelInput
from compress.pipelines.reporter import Reporter
from compress.pipelines.settings import Common, QuantizeSettings, resolve
from compress.pipelines.stage import Context
from compress.pipelines.workspace import Workspace
from compress.quantize.fisher import Fisher
from tests.integration.common import TRAINING, assert_recorded, run
from tests.tiny import tiny_checkpoint

pytestmark = pytest.mark.usefixtures("forked_reopen")

GIVEN = {"budget": "6bit", "rank": "4", "calibration_tokens": 2048}


def chain(folder: Path, full: Path, text_file: Path) -> Common:
    return Common(
        run=folder, model=str(full), data=str(text_file), dtype="float32", threads=1, effort="quick"
    )


def information(full: Path, common: Common, folder: Path) -> dict[str, tuple[torch.Tensor, Fisher]]:
    """Weight and Fisher information of every matrix."""
    checkpoint = Checkpoint(full)
    model = ModelInput(
        name="full",
        path=full,
        id="0",
        checkpoint=checkpoint,
        architecture=checkpoint_architecture(checkpoint),
    )
    context = Context(common=common, workspace=Workspace(folder / "none"), reporter=Reporter(quiet=True))
    settings = resolve(QuantizeSettings, GIVEN, "quick")
    files = FisherFiles(context, model, settings, str(common.data), "cpu", torch.float32, folder / "fisher")
    found = {}
    for matrix in matrices_of(model):
        found[matrix.module] = read_matrix(model, matrix).float(), files.layer(matrix.layer)[matrix.module]
    return found


def costs(folder: str, known: dict[str, tuple[torch.Tensor, Fisher]]) -> dict[str, float]:
    """``sum F E^2`` of every matrix of a checkpoint, in float64."""
    network: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found = {}
    for name, (weight, fisher) in known.items():
        assert fisher.full is not None
        error = (weight - network.get_submodule(name).dequantized_weight()).double()
        found[name] = float((fisher.full.double() * error.square()).sum())
    return found


def test_it_minds_what_the_loss_minds(tmp_path: Path, text_file: Path) -> None:
    full = tiny_checkpoint("llama_gqa", tmp_path / "full")
    common = chain(tmp_path / "fisher_run", full, text_file)
    stage = run("quantize", common, objective="fisher", **GIVEN)
    plain = run("quantize", chain(tmp_path / "plain_run", full, text_file), objective="frobenius", **GIVEN)
    known = information(full, common, tmp_path)
    cost = costs(stage["path"], known)
    for record in stage["metrics"]["matrices"]:
        weight, fisher = known[record["name"]]
        assert fisher.full is not None
        norm = float((fisher.full.double() * weight.double().square()).sum())
        assert record["relative_weighted_error"] == pytest.approx(
            math.sqrt(cost[record["name"]] / norm), rel=1e-3
        )
        assert "relative_output_error" not in record
    assert "relative_weighted_error" not in plain["metrics"]["matrices"][0]
    other = costs(plain["path"], known)
    assert sum(cost.values()) < 0.95 * sum(other.values())
    assert stage["metrics"]["squared_error"] > plain["metrics"]["squared_error"]
    assert stage["metrics"]["plain_rounding"] is None
    allocation = json.loads((Path(stage["path"]) / "allocation.json").read_text())
    assert allocation["cost"] == "squared error of the weights, weighed by the Fisher information"
    for entry in allocation["matrices"]:
        assert 0.5 < entry["expected_cost"] / cost[entry["name"]] < 2
    folders = {path.name for path in Path(stage["path"]).iterdir() if path.is_dir()}
    assert folders == set()


@pytest.mark.parametrize("objective", ["hessian", "fisher", "frobenius"])
def test_factors_in_16_bits(objective: str, tmp_path: Path, text_file: Path) -> None:
    full = tiny_checkpoint("llama_gqa", tmp_path / "full")
    common = chain(tmp_path / "run", full, text_file)
    given = {**GIVEN, "objective": objective, "factors": "16bit", "budget_includes": "none"}
    stage = run("quantize", common, **given)
    stored = load_file(Path(stage["path"]) / "model.safetensors")
    config = json.loads((Path(stage["path"]) / "config.json").read_text())["quantization_config"]
    for record in stage["metrics"]["matrices"]:
        name = record["name"]
        known = config["matrices"][name]
        assert (known["rank"], known["factor_config"]) == (4, None)
        rows, columns = known["shape"]
        assert stored[f"{name}.factor_out"].shape == (4, rows)
        assert stored[f"{name}.factor_in"].shape == (4, columns)
        assert stored[f"{name}.factor_in"].dtype == torch.float16
        bits = sum(8 * t.nbytes for key, t in stored.items() if key.startswith(f"{name}."))
        assert record["stored_bits"] == bits
    assert_recorded(AutoModelForCausalLM.from_pretrained(stage["path"]).eval(), Path(stage["path"]))
    run("train", common, method="lq", **TRAINING)
    assert run("recover", common)["metrics"]["differences"] > 0
    checked = CliRunner().invoke(app, ["verify", "--calibration", "--json", "--run", str(common.run)])
    assert checked.exit_code == 0, checked.stdout
    assert {check["result"] for check in json.loads(checked.stdout)["checks"]} == {"ok"}
