"""Stages that work on a model whose layers differ: matrices, statistics, quantized checkpoints, reopening."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from compress.model.checkpoint import Checkpoint, checkpoint_architecture
from compress.model.load import load_model
from compress.pipelines.dispatch import run_verb
from compress.pipelines.hessian_walk import HessianWalk
from compress.pipelines.matrices import matrices_of
from compress.pipelines.model_input import ModelInput
from compress.pipelines.reopen import check_ids, check_reopens, record_logits
from compress.pipelines.reporter import Reporter
from compress.pipelines.settings import Common, QuantizeSettings, resolve
from compress.pipelines.stage import Context
from compress.pipelines.workspace import Workspace
from compress.quantize.linear import LQLinear
from compress.structure import LayerShape
from tests.tiny import tiny_checkpoint
from tests.unit.uneven import Uneven, lopsided, make_uneven, slice_checkpoint, structure_of


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Uneven:
    return make_uneven("llama_tied", tmp_path_factory.mktemp("uneven"))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n\n".join(f"Line {i} of a text that has no other purpose. " * 20 for i in range(60)))
    return str(path)


def model_input(checkpoint: Checkpoint) -> ModelInput:
    return ModelInput(
        name="uneven",
        path=checkpoint.path,
        id="0",
        checkpoint=checkpoint,
        architecture=checkpoint_architecture(checkpoint),
    )


def test_the_matrices_are_those_that_are_there(made: Uneven) -> None:
    matrices = matrices_of(model_input(made.small))
    assert [m.layer for m in matrices] == [0] * 3 + [1] * 7 + [2] * 4
    assert all(made.small.shape(m.tensor) == m.shape for m in matrices)
    assert sum(m.numel for m in matrices) == made.small_arch.decoder_linear_parameters()


def test_a_walk_sees_the_inputs_of_every_linear(made: Uneven, text: str, tmp_path: Path) -> None:
    common = Common(run=tmp_path / "run", data=text, dtype="float32", threads=1)
    context = Context(common=common, workspace=Workspace(tmp_path / "run"), reporter=Reporter(quiet=True))
    settings = resolve(QuantizeSettings, {"calibration_tokens": 1024}, "quick")
    model = model_input(made.small)
    walk = HessianWalk(context, model, settings, text, "cpu", torch.float32)
    for layer in range(made.small_arch.layers):
        found = walk.statistics(layer)
        assert {name: len(s.weights) for name, s in found.items()} == {
            m.module: m.shape[1] for m in matrices_of(model) if m.layer == layer
        }
        walk.advance(layer)


@pytest.mark.usefixtures("forked_reopen")
@pytest.mark.parametrize("objective", ["hessian", "fisher", "frobenius"])
def test_it_is_quantized_and_trained(objective: str, made: Uneven, text: str, tmp_path: Path) -> None:
    # without the structure it stands for itself: it is the model to recover onto
    alone = shutil.copytree(made.small.path, tmp_path / "alone", ignore=shutil.ignore_patterns("structure*"))
    common = Common(run=tmp_path / "run", model=str(alone), data=text, dtype="float32", threads=1)
    given = {"budget": "10bit", "rank": "4", "objective": objective, "calibration_tokens": 1024}
    stage = run_verb("quantize", common, given, quiet=True)
    assert stage["metrics"]["reopened_relative_error"] <= 1e-4
    model = load_model(stage["path"], dtype=torch.float32)
    packed = {
        name: (m.out_features, m.in_features) for name, m in model.named_modules() if isinstance(m, LQLinear)
    }
    assert packed == {m.module: m.shape for m in matrices_of(model_input(made.small))}
    training = {"steps": 2, "micro_batch": 1, "accumulation": 1, "sequence": 32, "rank": 4, "method": "lq"}
    run_verb("train", common, training, quiet=True)
    recovered = run_verb("recover", common, {"merge": True}, quiet=True)
    assert recovered["metrics"]["reopened_relative_error"] <= 1e-4
    assert run_verb("verify", common, {}, quiet=True)["ok"]


@pytest.mark.usefixtures("forked_reopen")
def test_a_layer_without_any_matrix_passes_its_input_on(text: str, tmp_path: Path) -> None:
    full = Checkpoint(tiny_checkpoint("llama_tied", tmp_path / "full"))
    arch = checkpoint_architecture(full)
    shapes = lopsided(arch)
    shapes[1] = LayerShape(kv_heads=0, queries=2, channels=0)
    slice_checkpoint(full, arch, structure_of(arch, shapes), tmp_path / "small")
    common = Common(
        run=tmp_path / "run", model=str(tmp_path / "small"), data=text, dtype="float32", threads=1
    )
    stage = run_verb("quantize", common, {"budget": "5bit", "calibration_tokens": 1024}, quiet=True)
    assert {r["name"].split(".")[2] for r in stage["metrics"]["matrices"]} == {"0", "2"}


@pytest.mark.usefixtures("forked_reopen")
def test_a_fresh_process_reopens_it_with_our_loader_and_not_with_the_stock_one(tmp_path: Path) -> None:
    made = make_uneven("llama_gqa", tmp_path)
    record_logits(load_model(made.small.path), check_ids(128, 0), made.small.path)
    assert check_reopens(made.small.path) < 1e-6
    with pytest.raises(ValueError, match="compress_llama"):
        AutoModelForCausalLM.from_pretrained(made.small.path)
