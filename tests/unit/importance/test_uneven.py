"""Scores of models whose layers differ, or have lost a branch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from compress.adapters.attach import attach_lora
from compress.importance.base import create_criterion
from compress.importance.collect import collect
from compress.model.int8 import Int8Linear, to_int8
from compress.model.load import load_model
from tests.unit.importance.test_taylor import summed_loss, text
from tests.unit.prune.common import backward
from tests.unit.uneven import make_uneven


@pytest.mark.parametrize("kind", ["llama_gqa", "phi3"])
def test_every_layer_is_scored_by_its_own_sizes(kind: str, tmp_path: Path) -> None:
    uneven = make_uneven(kind, tmp_path)
    arch = uneven.small_arch
    for name in ("flap", "lora", "magnitude", "random", "taylor", "wanda"):
        model: Any = load_model(tmp_path / "small", dtype=torch.float32, device="cpu")
        criterion = create_criterion(name, arch)
        if criterion.needs == "adapters":
            model = attach_lora(model, arch, rank=4)
            backward(model, seed=0)
            criterion.observe(model)
        else:
            collect(criterion, model, arch, text(), loss=summed_loss, batch=5)
        scores = criterion.scores()
        restored = create_criterion(name, arch)
        restored.load_state_dict(criterion.state_dict())
        assert scores.finite
        for index, shape in enumerate(uneven.structure.shapes):
            for layer in (scores.layers[index], restored.scores().layers[index]):
                assert len(layer.kv_groups) == shape.kv_heads
                assert len(layer.query_heads) == shape.kv_heads * shape.queries
                assert len(layer.channels) == shape.channels
                assert all(
                    bool((part > 0).all()) for part in (layer.kv_groups, layer.query_heads, layer.channels)
                )


def test_magnitudes_are_those_of_what_is_left(tmp_path: Path) -> None:
    uneven = make_uneven("llama_gqa", tmp_path)
    model: Any = load_model(tmp_path / "small", dtype=torch.float32, device="cpu")
    criterion = create_criterion("magnitude", uneven.small_arch, normalize=False)
    criterion.observe(model)
    first, last = criterion.scores().layers[0], criterion.scores().layers[-1]
    mlp = model.get_submodule("model.layers.0.mlp")
    rows = [m.weight.detach().double().square() for m in (mlp.gate_proj, mlp.up_proj, mlp.down_proj)]
    torch.testing.assert_close(
        first.channels, rows[0].sum(1) + rows[1].sum(1) + rows[2].sum(0), rtol=1e-5, atol=0
    )
    attention = model.get_submodule(f"model.layers.{uneven.small_arch.layers - 1}.self_attn")
    sizes = [m.weight.detach().double().square() for m in (attention.q_proj, attention.o_proj)]
    heads = sizes[0].view(len(last.query_heads), -1).sum(1) + sizes[1].T.reshape(
        len(last.query_heads), -1
    ).sum(1)
    torch.testing.assert_close(last.query_heads, heads, rtol=1e-5, atol=0)


def test_an_uneven_model_has_an_8_bit_form(tmp_path: Path) -> None:
    uneven = make_uneven("llama_gqa", tmp_path)
    model: Any = load_model(tmp_path / "small", dtype=torch.float32, device="cpu")
    to_int8(model, uneven.small_arch)
    left = sum(len(uneven.small_arch.linears_at(layer)) for layer in range(uneven.small_arch.layers))
    assert sum(isinstance(module, Int8Linear) for module in model.modules()) == left
