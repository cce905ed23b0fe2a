"""What alignment is counted to hold, against an optimizer that took a step."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from compress.adapters.align import release_weights
from compress.adapters.fit_config import FitConfig
from compress.adapters.optimizer import make_optimizer
from compress.model.checkpoint import Checkpoint, checkpoint_architecture
from compress.model.load import load_model
from compress.pipelines.disk import align_disk
from compress.pipelines.footprint import align_footprint
from compress.pipelines.model_input import ModelInput
from compress.pipelines.phase import AGAIN, Footprint, Ground
from compress.pipelines.plan_models import PlannedModel
from compress.pipelines.settings import AlignSettings, resolve


def model_of(folder: Path, *, tied: bool) -> ModelInput:
    """A Llama with matrices that GaLore projects (512 x 512, 640 x 512) and some that it does not (32 x 512)."""
    config = LlamaConfig(
        hidden_size=512,
        intermediate_size=640,
        num_hidden_layers=2,
        num_attention_heads=16,
        num_key_value_heads=1,
        head_dim=32,
        vocab_size=200,
        tie_word_embeddings=tied,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    found = Checkpoint(folder)
    return ModelInput(
        name="m", path=folder, id="", checkpoint=found, architecture=checkpoint_architecture(found)
    )


def counted(model: ModelInput, **options: object) -> Footprint:
    settings = resolve(AlignSettings, {"loss": "text", **options}, "quick")
    planned = PlannedModel(name="", input=model)
    return align_footprint(planned, planned, settings, Ground(itemsize=4, length=64, windows=4))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("optimizer", ["adamw", "galore"])
def test_the_optimizer_holds_what_is_counted(optimizer: str, tied: bool, tmp_path: Path) -> None:
    if optimizer == "galore":
        pytest.importorskip("galore_torch")
    model = model_of(tmp_path / "model", tied=tied)
    network = load_model(model.path, dtype=torch.float32)
    release_weights(network)
    trained = {n: p for n, p in network.named_parameters() if p.requires_grad}
    made = make_optimizer(network, trained, FitConfig(steps=1, optimizer=optimizer))
    for parameter in trained.values():
        parameter.grad = torch.randn_like(parameter)
    made.step()
    held = {}
    for state in made.state.values():
        tensors = [state["exp_avg"], state["exp_avg_sq"]]
        tensors += [state["projector"].ortho_matrix] if "projector" in state else []
        held |= {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    phases = counted(model, optimizer=optimizer).phases
    backward = next(phase for phase in phases if phase.name == "backward")
    assert backward.device["optimizer"] == sum(held.values())
    assert backward.device["gradients"] == sum(p.grad.nbytes for p in trained.values() if p.grad is not None)


def test_layers_that_run_again_keep_float32_inputs(tmp_path: Path) -> None:
    model = model_of(tmp_path / "model", tied=False)
    plain, again = (counted(model, recompute=recompute) for recompute in (False, True))
    before = next(phase for phase in plain.phases if phase.name == "backward").device
    after = next(phase for phase in again.phases if phase.name == f"backward{AGAIN}").device
    tokens = 4 * 128
    layers = 2
    assert after["activations"] == before["activations"] / layers + tokens * layers * 4 * 512
    assert after["activations"] < 0.7 * before["activations"]
    assert {**before, "activations": 0.0} == {**after, "activations": 0.0}


def test_galore_needs_less_where_it_is_advised(tmp_path: Path) -> None:
    """Its moments are smaller, its update works on one matrix at a time, and so is its state on disk."""
    model = model_of(tmp_path / "model", tied=False)
    adamw, galore = (counted(model, optimizer=name) for name in ("adamw", "galore"))
    assert [phase.name for phase in galore.phases if "update" in phase.device] == ["project"]
    assert galore.disk_peak < adamw.disk_peak
    widest = 8 * 200 * 512  # the embedding: its roots and its step
    largest = 4 * (2 * 640 * 512 + 5 * 512 * 512)
    assert next(p for p in galore.phases if p.name == "project").device["update"] == max(widest, largest)
    settings = resolve(AlignSettings, {"optimizer": "galore", "loss": "text"}, "quick")
    assert align_disk(model, model, settings, torch.float32, "quick") >= galore.disk_peak
