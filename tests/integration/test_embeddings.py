"""``quantize --embeddings``: the embedding and the output matrix as codes, end to end on tiny models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from compress.__main__ import app
from compress.errors import CompressError, UsageError
from compress.model.checkpoint import Checkpoint, checkpoint_architecture
from compress.model.load import load_model
from compress.pipelines.allocate import limit_in_bits
from compress.pipelines.matrices import matrices_of
from compress.pipelines.model_input import ModelInput
from compress.pipelines.settings import Common, QuantizeSettings, resolve
from compress.pipelines.vocabulary import vocabulary_matrices
from compress.quantize.embedding import LQEmbedding, LQTiedHead
from compress.quantize.linear import LQLinear
from compress.solvers.budget import parse_budget
from tests.integration.common import TRAINING, assert_recorded, run
from tests.tiny import tiny_checkpoint

pytestmark = pytest.mark.usefixtures("forked_reopen")

SMALL: dict[str, Any] = {"calibration_tokens": 512}
EMBEDDING, HEAD = "model.embed_tokens", "lm_head"


def common_of(kind: str, text_file: Path, place: Path) -> Common:
    full = tiny_checkpoint(kind, place / "full")
    return Common(
        run=place / "run", model=str(full), data=str(text_file), dtype="float32", threads=1, effort="quick"
    )


def stored(stage: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {record["name"]: record for record in stage["metrics"]["matrices"]}


def verified(run_: Path) -> None:
    result = CliRunner().invoke(app, ["verify", "--json", "--run", str(run_)])
    answer = json.loads(result.stdout)
    assert answer["ok"], [check for check in answer["checks"] if check["result"] == "differs"]


@pytest.mark.parametrize("objective", ["hessian", "frobenius"])
@pytest.mark.parametrize("kind", ["llama_tied", "qwen2"])
def test_on_the_menu_they_share_the_budget_with_every_matrix(
    kind: str, objective: str, text_file: Path, tmp_path: Path
) -> None:
    common = common_of(kind, text_file, tmp_path)
    stage = run("quantize", common, budget="4bit", objective=objective, embeddings="menu", **SMALL)
    records = stored(stage)
    assert (HEAD in records) == (kind == "qwen2")
    assert records[EMBEDDING]["rank"] == 0
    assert all(record["counted"] for record in records.values())
    bits = sum(record["stored_bits"] for record in records.values())
    weights = sum(record["stored_bits"] / record["bits_per_weight"] for record in records.values())
    assert stage["metrics"]["stored_bits_per_weight"] == pytest.approx(bits / weights)
    assert bits / weights <= 4
    model: Any = load_model(stage["path"], dtype=torch.float32)
    assert type(model.get_input_embeddings()) is LQEmbedding
    assert type(model.get_output_embeddings()) is (LQTiedHead if kind == "llama_tied" else LQLinear)
    assert_recorded(model, Path(stage["path"]))
    verified(common.run)


def test_a_budget_in_bytes_holds_and_goes_below_what_kept_embeddings_take(
    text_file: Path, tmp_path: Path
) -> None:
    common = common_of("llama_tied", text_file, tmp_path)
    checkpoint = Checkpoint(Path(str(common.model)))
    model = ModelInput(
        name="full",
        path=checkpoint.path,
        id="",
        checkpoint=checkpoint,
        architecture=checkpoint_architecture(checkpoint),
    )

    def fits(kilobytes: int, embeddings: str) -> bool:
        settings = resolve(QuantizeSettings, {"embeddings": embeddings}, "quick")
        matrices = [*(vocabulary_matrices(model) if embeddings == "menu" else ()), *matrices_of(model)]
        try:
            limit_in_bits(parse_budget(f"{kilobytes}kB"), model, matrices, settings, None)
        except CompressError:
            return False
        return True

    sizes = range(1, checkpoint.bytes // 1000)
    kept, chosen = (next(k for k in sizes if fits(k, mode)) for mode in ("keep", "menu"))
    assert chosen < kept
    with pytest.raises(CompressError, match="--embeddings menu"):
        run("quantize", common, budget=f"{chosen}kB", **SMALL)
    stage = run("quantize", common, budget=f"{chosen}kB", embeddings="menu", **SMALL)
    assert Checkpoint(Path(stage["path"])).bytes <= 1000 * chosen
    verified(common.run)


@pytest.mark.parametrize("objective", ["hessian", "fisher"])
def test_eight_bits_are_no_part_of_a_budget_in_bits(objective: str, text_file: Path, tmp_path: Path) -> None:
    common = common_of("llama_tied", text_file, tmp_path)
    stage = run("quantize", common, budget="4bit", objective=objective, embeddings="8bit", **SMALL)
    records = stored(stage)
    assert [name for name, record in records.items() if not record["counted"]] == [EMBEDDING]
    assert records[EMBEDDING]["bits"] == 8
    assert records[EMBEDDING]["relative_error"] < 0.02
    others = [record for name, record in records.items() if name != EMBEDDING]
    bits = sum(record["stored_bits"] for record in others)
    weights = sum(record["stored_bits"] / record["bits_per_weight"] for record in others)
    assert stage["metrics"]["stored_bits_per_weight"] == pytest.approx(bits / weights)
    verified(common.run)


def test_an_adapter_trained_on_it_goes_onto_the_full_model(text_file: Path, tmp_path: Path) -> None:
    common = common_of("llama_tied", text_file, tmp_path)
    run("quantize", common, budget="4bit", embeddings="menu", **SMALL)
    trained = run("train", common, **TRAINING)["metrics"]
    assert trained["validation_loss_after"] < trained["validation_loss_before"]
    assert run("recover", common)["metrics"]["delta_norm"] > 0
    verified(common.run)


def test_fisher_cannot_compare_embeddings_with_matrices(text_file: Path, tmp_path: Path) -> None:
    common = common_of("llama_tied", text_file, tmp_path)
    with pytest.raises(UsageError, match="fisher"):
        run("quantize", common, objective="fisher", embeddings="menu")
